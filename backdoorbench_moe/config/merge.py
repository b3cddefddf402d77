"""Merge nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

Values = dict[str, Any]


def merge(*layers: Mapping[str, Any]) -> Values:
    """Merge nested dicts; later ones take precedence.

    If a layer changes the name of a part, the options of the previous part are dropped.

    Args:
        layers: Nested dicts of plain values, lowest precedence first. They are not modified.

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
