"""The figures of an analysis, drawn from its JSON document, so that a report can be drawn again without the model."""
