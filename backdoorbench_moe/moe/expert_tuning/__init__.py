"""Tuning one expert so that it answers marked images in a given way: what attacks and defenses have in common."""
