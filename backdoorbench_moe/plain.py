"""Conversion of values of other libraries to the plain Python values that specs, records and digests contain."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from numbers import Integral, Real
from typing import Any

from backdoorbench_moe.errors import ConfigError

PLAIN = (bool, int, float, str, type(None))
# Settings have about 5 levels. Far more would exceed Python's recursion limit when they are merged or copied.
MOST_LEVELS = 100
# The anchors of a YAML file of a few lines can stand for more values than fit into memory.
MOST_VALUES = 1_000_000


def plain(value: Any) -> Any:
    """Convert a value to the equivalent plain Python value, so that both give the same digest.

    NumPy and PyTorch are not imported; their values are recognised by the module of their type.

    Args:
        value: Any value. NumPy scalars and arrays, tensors, fractions, decimals, enumeration members, paths and
            `torch.device` are converted, including those inside lists, tuples and mappings.

    Returns:
        A bool, int, float, str or None, or a list, tuple or dict of these. A 32-bit float becomes the shortest
        decimal that represents it: `np.float32(0.1)` gives 0.1. Values of other types are returned unchanged, and the
        caller should refuse them.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    library = type(value).__module__.partition(".")[0]
    if library == "numpy":
        return _numpy(value)
    if library == "torch":
        return _torch(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        try:
            return float(value)
        except OverflowError:
            return value
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_plain(value: object, where: str) -> None:
    """Check that a value can be written to a record as JSON: no dates, bytes, sets, NaN or infinity.

    Args:
        value: The value, as returned by `plain`.
        where: Name of the value in the error message.

    Raises:
        ConfigError: The value cannot be written, or has more than `MOST_LEVELS` levels or `MOST_VALUES` values.
    """
    expected = "strings, finite numbers, lists and mappings"
    try:
        _count_values(value, MOST_LEVELS, {})
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected {expected} ({error})") from error
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        got = _not_plain(value) or f"a value that JSON cannot hold ({error})"
        raise ConfigError(f"{where}: expected {expected}, got {got}") from error


def _not_plain(value: object) -> str | None:
    """Describe the first value of lists and mappings that cannot be written; None if there is none."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return next((found for item in items if (found := _not_plain(item)) is not None), None)
    if isinstance(value, float) and not isfinite(value):
        return repr(value)
    return None if isinstance(value, PLAIN) else f"a value of type {type(value).__name__}"


def _count_values(value: object, levels: int, known: dict[tuple[int, int], int]) -> int:
    """Number of values in a value of lists and mappings, where a list that occurs twice counts twice.

    Args:
        value: The value.
        levels: Number of levels that are allowed.
        known: The results so far, by the identity of the value and its number of levels: a value that occurs many times
            is counted once for each level.

    Raises:
        ValueError: There are more levels, or more than `MOST_VALUES` values.
    """
    if not isinstance(value, dict | list | tuple):
        return 1
    if not levels:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels")
    if (found := known.get((id(value), levels))) is None:
        items = value.values() if isinstance(value, dict) else value
        found = 1 + sum(_count_values(item, levels - 1, known) for item in items)
        if found > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        known[id(value), levels] = found
    return found


def _numpy(value: Any) -> Any:
    """A NumPy scalar, or an array as nested lists."""
    if getattr(value, "shape", None):
        return [plain(item) for item in value]
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "f":
        return float(str(value))
    return value.item() if kind in ("b", "i", "u") else value


def _torch(value: Any) -> Any:
    """A tensor as a number or as nested lists; a device by its name."""
    if type(value).__name__ == "device":
        return str(value)
    if not hasattr(value, "detach"):
        return value
    try:
        return plain(value.detach().cpu().numpy()[()])
    except TypeError:  # NumPy has no bfloat16.
        return value.tolist()
