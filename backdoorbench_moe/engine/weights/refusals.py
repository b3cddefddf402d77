"""One-line errors about files of weights, and texts from these files in them."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.errors import RecordError


def refusal(file: Path, reason: str) -> RecordError:
    """Return the error for a file: "weights FILE: reason"."""
    return RecordError(f"weights {file}: {reason}")


def short(text: str) -> str:
    """Format a text from a file for a message: printable, in one line, at most 60 characters."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, printable and of at most 200 characters, or else the error's type."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    shown = text if text.isprintable() else ascii(text)
    return (shown[:200] or type(error).__name__).rstrip(". ")
