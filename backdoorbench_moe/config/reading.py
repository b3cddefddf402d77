"""Build a `RunSpec` from plain values, and check every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.mixture import MixtureSpec
from backdoorbench_moe.config.poison import PoisonSpec
from backdoorbench_moe.config.shorthand import (
    OPTIONAL_PARTS,
    PART_LISTS,
    PARTS,
    no_part,
    normalise_list,
    normalise_part,
)
from backdoorbench_moe.config.spec import DEFAULT_ATTACK, PartSpec, RunSpec
from backdoorbench_moe.config.train import TrainSpec
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.options import field_types


def spec_from_dict(values: Mapping[str, Any]) -> RunSpec:
    """Build a spec from a nested dict. Missing keys have their defaults.

    Raises:
        UnknownNameError: A key does not exist.
        ConfigError: A value is of the wrong type or out of range; the message names its key.
    """
    return cast(RunSpec, _read(RunSpec, _fill_in_attack(values), ""))


def _fill_in_attack(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the keys that the attack implies.

    The default attack with a null trigger means no attack, since this is how `RunSpec.to_dict` writes clean runs. For
    any other attack, trigger and applicator are None unless they are given.
    """
    if not isinstance(values, Mapping):
        return values
    attack = values.get("attack", DEFAULT_ATTACK)
    name = attack.get("name") if isinstance(attack, Mapping) else attack
    if name == DEFAULT_ATTACK and "trigger" in values and values["trigger"] is None:
        return {**values, "attack": None}
    if name != DEFAULT_ATTACK:
        return {"trigger": None, "applicator": None, **values}
    return values


def _read(kind: type, values: object, where: str) -> Any:
    """Build the dataclass `kind` from a dict whose keys are names of fields. `where` is the key of the dict itself."""
    if not isinstance(values, Mapping):
        raise ConfigError.expected(where or "config", "a mapping", values)
    hints = field_types(kind)
    known = [item.name for item in fields(kind)]
    checked: Values = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UnknownNameError(f"{where or 'config'}: key", str(key), known)
        if key in PARTS and kind is RunSpec:
            checked[key] = _read_part(value, path, optional=key in OPTIONAL_PARTS)
        elif key in PART_LISTS:
            parts = normalise_list(path, value)
            checked[key] = tuple(_read_part(item, f"{path}[{i}]") for i, item in enumerate(parts))
        elif key == "files" and kind is RunSpec:
            checked[key] = _read_files(value)
        elif hints[key] in (PoisonSpec, TrainSpec):
            checked[key] = _read_settings(hints[key], value, path)
        elif key == "mixture" and kind is RunSpec:
            checked[key] = None if value is None else _read(MixtureSpec, value, path)
        else:
            checked[key] = value  # The dataclass converts and checks it.
    return kind(**checked)


def _read_settings(kind: type, value: object, where: str) -> Any:
    """Build a `PoisonSpec` or `TrainSpec`. Errors of a `TrainSpec` always name "train.", which is corrected here."""
    try:
        return _read(kind, value, where)
    except ConfigError as error:
        if where == "train" or not str(error).startswith("train."):
            raise
        raise ConfigError(str(error).replace("train.", f"{where}.")) from None


def _read_files(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for pair in value.items() for text in pair
    ):
        raise ConfigError.expected("files", "a mapping from keys of options to SHA-256 digests", value)
    return dict(value)


def _read_part(value: object, where: str, *, optional: bool = False) -> PartSpec | None:
    if value is None and optional:
        return None
    if where == "attack":
        value = normalise_part(where, value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise no_part(where, value)
    options = {str(key): item for key, item in value.items() if key != "name"}
    return PartSpec(value["name"], options)
