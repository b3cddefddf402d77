"""Makers: each creates one kind of run, from data or from other runs."""
