"""Checks of the values that a pickle made."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles.machine import Stateful


def check_structure(value: object, depth: int) -> None:
    """Check that a value made of dicts, lists and tuples is complete, not in itself, and not nested too deeply.

    Every container is visited once, so that one of which a few refer to each other many times is no problem.

    Args:
        value: The value.
        depth: How deep containers may be nested.

    Raises:
        DataError: It contains itself, is nested more deeply, or has an array without values.
    """
    open_: dict[int, None] = {}
    heights: dict[int, int] = {}
    path: list[tuple[object, Iterator[object], int]] = []

    def enter(container: object) -> None:
        open_[id(container)] = None
        path.append((container, _parts(container), 1))
        if len(path) > depth:
            raise DataError(f"expected containers nested at most {depth} deep, got more")

    if isinstance(value, dict | list | tuple):
        enter(value)
    while path:
        container, parts, height = path.pop()
        for part in parts:
            if isinstance(part, Stateful) and not part.complete:
                raise DataError("expected an array with values, got none")
            if not isinstance(part, dict | list | tuple):
                continue
            if id(part) in open_:
                raise DataError("refused a value that contains itself")
            if (known := heights.get(id(part))) is None:
                path.append((container, parts, height))
                enter(part)
                break
            height = max(height, known + 1)
            if len(path) + height > depth:
                raise DataError(f"expected containers nested at most {depth} deep, got more")
        else:
            del open_[id(container)]
            heights[id(container)] = height
            if path:
                above, rest, known = path.pop()
                path.append((above, rest, max(known, height + 1)))


def _parts(container: object) -> Iterator[object]:
    """The values in a container; keys of dicts are texts or numbers."""
    if isinstance(container, dict):
        return iter(container.values())
    assert isinstance(container, list | tuple)
    return iter(container)
