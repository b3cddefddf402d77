"""Weights that were made elsewhere: read safely, and fitted to a model."""
