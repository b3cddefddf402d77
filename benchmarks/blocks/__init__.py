"""Tables in the text of pages, drawn from committed records; `redraw.py` inserts them.

Each module has the tables of one subject, and a function that returns the Markdown for each name in its `BLOCKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import attacks, audits, defenses, mixtures, overview

BLOCKS: dict[str, Callable[[Path], str]] = {
    name: draw
    for module in (attacks, defenses, mixtures, audits, overview)
    for name, draw in module.BLOCKS.items()
}
