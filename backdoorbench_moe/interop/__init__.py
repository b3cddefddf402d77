"""Importing results of other tools, which are read as data, and exporting runs in their formats."""
