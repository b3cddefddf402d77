"""Merge nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from backdoorbench_moe.plain import PLAIN

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
                merged[key] = _copy(value)
    return merged


def _copy(value: Any) -> Any:
    """Copy a value, several times as fast as `deepcopy` if it is plain: a suite merges thousands of settings."""
    kind = type(value)
    if kind is dict:
        return {key: _copy(item) for key, item in value.items()}
    if kind is list:
        return [_copy(item) for item in value]
    return value if kind in PLAIN else deepcopy(value)


def _is_renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]
