"""Merging nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

Values = dict[str, Any]


def merge(*layers: Mapping[str, Any]) -> Values:
    """Merge nested dicts; later ones win.

    A part that gets another name loses the options of the earlier one: they belonged to that name.

    Args:
        layers: Nested dicts of plain values, lowest first. They are not modified.

    Returns:
        A new nested dict that shares nothing with the layers.
    """
    merged: Values = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            if isinstance(old, dict) and isinstance(value, Mapping) and not _is_renamed(old, value):
                merged[key] = merge(old, value)
            else:
                merged[key] = deepcopy(value)
    return merged


def _is_renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]
