"""Format the docstrings of parts for the terminal."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path

# Start of an entry in a section such as "Args:", or of a list item.
ENTRY = re.compile(r"\*{0,2}\w+(, \*{0,2}\w+)*( \([^)]*\))?: |[-*] ")
SECTION = re.compile(r"[A-Z]\w*:$")
HANGING = "    "


def reflow(docstring: str, width: int) -> str:
    """Wrap a docstring to lines of `width` characters, keeping its paragraphs, sections and lists.

    Line breaks inside a paragraph are removed first; otherwise wrapping would leave lines of one word.
    """
    blocks: list[tuple[int, list[str]]] = []
    after_break = True
    for line in inspect.cleandoc(docstring).splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            blocks.append((0, []))
            after_break = True
            continue
        if after_break or SECTION.match(text) or not _continues(blocks[-1], text, indent):
            blocks.append((indent, []))
        blocks[-1][1].append(text)
        after_break = bool(SECTION.match(text))
    return "\n".join(_fill(indent, " ".join(lines), width) for indent, lines in blocks)


def _continues(block: tuple[int, list[str]], text: str, indent: int) -> bool:
    start, _ = block
    if indent > start:
        return True
    return indent == start and not (ENTRY.match(text) and (start > 0 or text[0] in "-*"))


def _fill(indent: int, text: str, width: int) -> str:
    head = " " * indent
    rest = head + HANGING if ENTRY.match(text) and (indent or text[0] in "-*") else head
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def summary(docstring: str | None) -> str:
    """Return the first sentence of a docstring in one line; "" if it is empty."""
    paragraph = inspect.cleandoc(docstring or "").partition("\n\n")[0]
    line = " ".join(paragraph.split())
    return re.split(r"(?<=[a-z0-9)\]`'\"%])\.(?= [A-Z]|$)", line, maxsplit=1)[0]


def docstring_of(target: str) -> str | None:
    """Return the docstring of "module:Class", read from the module's source without importing the module.

    Only its parent packages are imported. None if there is no such class, or it has no docstring.
    """
    module, _, name = target.partition(":")
    try:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            return None
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (ImportError, OSError, SyntaxError, ValueError):
        return None
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return ast.get_docstring(found[-1]) if found else None
