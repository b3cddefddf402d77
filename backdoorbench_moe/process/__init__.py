"""The process: the cores, the memory and the signals that it has."""
