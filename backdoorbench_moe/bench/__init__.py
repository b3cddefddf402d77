"""Benchmark suites: YAML files of runs, their execution, and tables that compare the results with the paper's."""
