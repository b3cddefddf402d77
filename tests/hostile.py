"""The list of files that are made to harm whoever reads them, which other modules fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CANARY = "canary"
TOUCH = f"touch {CANARY}"


@dataclass(frozen=True)
class Hostile:
    """A file: who must refuse it, with which reason, and how it is written."""

    reader: str
    reason: str
    write: Callable[[Path], object]


HOSTILE: dict[str, Hostile] = {}


def hostile(name: str, reader: str, reason: str, content: bytes | Callable[[Path], object]) -> None:
    """Add a file: its bytes, or a function that writes it."""
    assert name not in HOSTILE
    write = content if callable(content) else (lambda path: path.write_bytes(content))
    HOSTILE[name] = Hostile(reader, reason, write)
