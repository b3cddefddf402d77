"""Counts and capital letters in messages."""

from __future__ import annotations


def count(amount: int, what: str) -> str:
    """Return a number with its noun: "1 epoch", "2 epochs", "1,000 patches".

    Args:
        amount: The number.
        what: A singular noun with a regular plural; in a phrase, only the last word is changed.
    """
    hissing = what.endswith(("s", "x", "z", "sh", "tch"))
    plural = f"{what}es" if hissing else f"{what}s"
    return f"{amount:,} {what if amount == 1 else plural}"


def capital(text: str) -> str:
    """Capitalise the first letter of a string, which may be empty, and keep the others."""
    return text[:1].upper() + text[1:]
