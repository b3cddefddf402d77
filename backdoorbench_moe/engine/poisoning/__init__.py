"""Poisoning: stamping, relabelling, the policy, and the state of learned triggers."""
