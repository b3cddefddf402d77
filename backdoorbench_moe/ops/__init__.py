"""Functions of tensors and numbers that use no registry and no run."""
