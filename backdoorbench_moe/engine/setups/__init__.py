"""Setups of runs: model, data, tasks, poison and metrics, built from a spec."""
