"""Makes pages of our docstrings: what is plain text in Python is not to become markup.

A docstring here explains names in sentences of their own ("rate: share of the training set. target: ..."). Markdown
would run them together, take <class> for a tag and stars for emphasis. This makes a list of the names and escapes
the rest, outside of `code`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import griffe

NAMED = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): ")
# What begins a piece behind the end of a sentence; an upper-case word with a colon is a sentence like any other.
BEGIN = re.compile(r"(?<=\.) (?=(?:[a-z_]\w*(?:, [a-z_]\w*)*: |Raises |Returns |Source: |Subclasses ))")
CODE = re.compile(r"(`[^`]*`)")
MARKUP = str.maketrans({sign: f"\\{sign}" for sign in "*_[]#"} | {"<": "&lt;", ">": "&gt;"})


class PlainDocstrings(griffe.Extension):
    """Rewrites the docstring of every object when it has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Markdown that reads as the docstring does."""
    pieces = [piece for part in re.split(r"\n\s*\n", text.strip()) for piece in _pieces(part)]
    lines = [pieces[0]]
    for before, piece in itertools.pairwise(pieces):
        between = "\n" if before.startswith("- ") and piece.startswith("- ") else "\n\n"
        lines.append(between + piece)
    return "".join(lines)


def _pieces(paragraph: str) -> list[str]:
    """A paragraph as items of a list, where it names things, and as paragraphs."""
    found = []
    for piece in BEGIN.split(" ".join(paragraph.split())):
        named = NAMED.match(piece)
        is_item = named is not None and not piece.startswith(("Source", "Raises", "Returns"))
        found.append(
            f"- `{named[1]}`: {_escape(piece[named.end() :])}" if named and is_item else _escape(piece)
        )
    return found


def _escape(text: str) -> str:
    parts = CODE.split(text)
    return "".join(part if index % 2 else part.translate(MARKUP) for index, part in enumerate(parts))
