"""From the records of a suite to tables, plots and comparisons."""
