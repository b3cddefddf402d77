"""Makers: each makes one kind of run, from nothing or from other runs."""
