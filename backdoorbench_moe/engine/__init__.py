"""Execution of runs: poison, train, defend, evaluate, record."""
