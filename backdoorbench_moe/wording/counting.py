"""Words of sentences: numbers of things, and capital letters."""

from __future__ import annotations


def count(amount: int, what: str) -> str:
    """Say how many: "1 epoch", "2 epochs", "1,000 patches".

    Args:
        amount: The number.
        what: The thing in the singular, with a regular plural; of several words, the last is changed.
    """
    hissing = what.endswith(("s", "x", "z", "sh", "tch"))
    plural = f"{what}es" if hissing else f"{what}s"
    return f"{amount:,} {what if amount == 1 else plural}"


def capital(text: str) -> str:
    """Capitalise the first letter of a text, which may be empty, and leave the others."""
    return text[:1].upper() + text[1:]
