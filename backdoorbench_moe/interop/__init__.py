"""Results of other tools, read as data, and runs written in their form."""
