"""Measuring a model, and what a defense says."""
