"""Measure models, and the judgements of defenses."""
