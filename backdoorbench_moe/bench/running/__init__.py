"""Execution of missing runs: plan, time estimate, workers."""
