"""Figures of a report, drawn from the JSON document, so that a report can be redrawn without the model."""
