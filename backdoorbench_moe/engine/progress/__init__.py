"""Progress of runs, and their display in notebooks."""
