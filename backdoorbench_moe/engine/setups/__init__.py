"""What a run is made of: model, data, training, poison and metrics, built from its spec."""
