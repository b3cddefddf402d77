"""Models opened to be looked into: of a run, of a file, or any module."""
