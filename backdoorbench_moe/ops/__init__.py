"""Pure functions of tensors and numbers, which use no registry, run or file."""
