"""Training: of a new model, and further training by an attack or a defense."""
