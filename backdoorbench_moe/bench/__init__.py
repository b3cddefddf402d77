"""Suites (YAML) to runs to tables: the paper's tables, measured beside the paper."""
