"""Suites: which runs they consist of, their tables and plots, and the published values they are compared with."""
