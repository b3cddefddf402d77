"""Tables, plots and comparisons of the records of suites."""
