"""Audits: whether a model of unknown origin shows signs of a backdoor, with reasons."""
