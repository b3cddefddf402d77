"""Pure tensor functions; they know nothing of registries, runs or files."""
