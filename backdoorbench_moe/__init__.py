"""Backdoor attacks and defenses on Mixture-of-Experts image models."""

__version__ = "0.1.0"
