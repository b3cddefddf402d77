"""Read weight files from other sources safely, and load them into models."""
