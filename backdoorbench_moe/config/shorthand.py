"""Expand the short forms that users may write to the long form that specs are read from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.errors import BbmoeWarning, ConfigError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.plain import PLAIN, plain

# The model on which a trigger is optimised, instead of the victim's.
SURROGATE = "surrogate"
PARTS = (*(kind.key for kind in KINDS.values() if not kind.repeated), SURROGATE)
PART_LISTS = tuple(kind.key for kind in KINDS.values() if kind.repeated)
OPTIONAL_PARTS = (*(kind.key for kind in KINDS.values() if kind.optional), SURROGATE)


def normalise(layer: Mapping[str, Any]) -> Values:
    """Convert every part of a layer to a dict.

    Args:
        layer: Settings in which a part is a name, or a dict whose name may be missing.

    Returns:
        The same settings, in which each part is a dict, or None for an optional part that is absent.

    Raises:
        ConfigError: A part is neither a name nor a dict, or its name is not a string.
    """
    known: dict[str, Callable[[str, Any], Any]] = dict.fromkeys(PARTS, normalise_part)
    known |= dict.fromkeys(PART_LISTS, normalise_list)
    return {key: known[key](key, value) if key in known else value for key, value in layer.items()}


def normalise_list(key: str, value: object) -> list[Values | None]:
    """Convert a list of parts to dicts. Raises ConfigError that names the first item that is not a part."""
    if not isinstance(value, list | tuple):
        raise ConfigError.expected(key, "a list of names, or of mappings with the key 'name'", value)
    return [normalise_part(f"{key}[{place}]", item) for place, item in enumerate(value)]


def normalise_part(key: str, value: object) -> Values | None:
    """Convert one part to a dict; None stays None if the part is optional. Raises ConfigError if it is not a part."""
    if isinstance(value, str):
        return {"name": value}
    if value is None and key in OPTIONAL_PARTS:
        return None
    if not isinstance(value, Mapping):
        raise no_part(key, value)
    if not isinstance(value.get("name", ""), str):
        raise ConfigError.expected(f"{key}.name", "a string", value["name"])
    return dict(value)


def no_part(key: str, value: object) -> ConfigError:
    """Return the error for a value that is neither a name nor a mapping, in one line also for a module.

    Args:
        key: Key of the part, such as "model" or "defenses[0]".
        value: The value.
    """
    expected = "a name, or a mapping with the key 'name'"
    if isinstance(value, PLAIN) or type(value) in (list, tuple, set, dict):
        return ConfigError.expected(key, expected, value)
    got = f"the class {value.__name__}" if isinstance(value, type) else _kind_of(value)
    hint = "a part of your own needs a plug-in (see `bbmoe plugin new --help`)"
    return ConfigError(f"{key}: expected {expected}, got {got}; {hint}")


def _kind_of(value: object) -> str:
    """Return the class of an object; torch is not imported, so a module is recognised by its methods."""
    is_module = hasattr(value, "state_dict") and hasattr(value, "forward")
    name = type(value).__name__
    return f"a {name} module" if is_module else f"an object of class {name}"


def read_rate(key: str, value: object) -> object:
    """Convert "1%" to 0.01; return any other value as a plain value.

    Args:
        key: Key of the rate, such as "poison.rate". For this key only, the integer 1, which means 100%, gives a
            warning: for other keys it is out of range.
        value: The rate.

    Raises:
        ConfigError: The rate is above 100%.
    """
    value = plain(value)
    if key == "poison.rate" and value == 1 and isinstance(value, int) and not isinstance(value, bool):
        warnings.warn(
            "poison.rate: 1 means 100% of the training images; write 1% for one percent, or 1.0 for 100% without "
            "this warning",
            BbmoeWarning,
            stacklevel=2,
        )
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            rate = float(Decimal(value.strip()[:-1].strip()).scaleb(-2))
        except ArithmeticError:
            return value
        if rate > 1:
            raise ConfigError.expected(key, "at most 100%", value)
        return rate
    return value
