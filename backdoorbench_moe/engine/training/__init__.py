"""Train new models, and fine-tune models for attacks and defenses."""
