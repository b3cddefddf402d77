"""Open models for analysis: from a run, a file or any module."""
