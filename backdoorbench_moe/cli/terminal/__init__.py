"""The terminal: streams, signals, progress."""
