"""Fine-tuning an expert to classify marked images in a given way, as attacks and defenses do."""
