"""Checking the values that a pickle created."""

from __future__ import annotations

from collections.abc import Iterator

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles.machine import Stateful


def check_structure(value: object, depth: int) -> None:
    """Check that a value of dicts, lists and tuples is complete, does not contain itself, and is not nested too deeply.

    Every container is visited once, so containers that share parts many times are checked quickly.

    Args:
        value: The value.
        depth: Maximum nesting depth of containers.

    Raises:
        DataError: The value contains itself, is nested too deeply, or has an array without values.
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
    """Return the values in a container. Keys of dicts are strings or numbers and need no check."""
    if isinstance(container, dict):
        return iter(container.values())
    assert isinstance(container, list | tuple)
    return iter(container)
