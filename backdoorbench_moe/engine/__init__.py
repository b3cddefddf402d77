"""What one run does: poison, train, evaluate, record."""
