"""Suites: what is to be run, what is drawn from it, and the published numbers beside it."""
