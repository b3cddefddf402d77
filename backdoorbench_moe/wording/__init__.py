"""Helpers for messages: counts, capital letters, and suggestions for misspelled names."""
