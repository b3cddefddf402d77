"""Settings that have no column of their own in `bbmoe show`, and those of them in which runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from backdoorbench_moe.config.mixture import TRAININGS, WEIGHTS
from backdoorbench_moe.records import Record
from backdoorbench_moe.records.sharing import without_folders

# Parts whose options have no column.
PARTS = ("dataset", "model", "splitter", "surrogate")
# The only one of their names that no column contains.
SPLITTER = "splitter.name"
# Settings of the attacker. A clean run has them as well, but does not use them.
OF_ATTACKS = ("poison.", "mixture.poisoned_experts")
# Settings with a column, and paths.
LEFT_OUT = ("poison.rate", "train.epochs", "mixture.experts", "mixture.task", WEIGHTS)


def differing_settings(records: Sequence[Record]) -> list[str]:
    """Return the keys of `other_settings` in which runs differ, in the order of the spec.

    The options of a part are compared only between runs whose part has the same name: other parts have other options,
    and a column shows the name.
    """
    settings = [other_settings(record) for record in records]
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if _differs(key, settings)]


def _differs(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    part = key.partition(".")[0]
    found: dict[str, set[str]] = {}
    for values in settings:
        if part in PARTS and key != SPLITTER:
            if (name := values.get(f"{part}.name")) is not None:
                found.setdefault(name, set()).add(repr(values.get(key)))
        elif key in values:
            found.setdefault("", set()).add(repr(values[key]))
    return any(len(texts) > 1 for texts in found.values())


def other_settings(record: Record) -> dict[str, Any]:
    """Return the settings of a run that have no column, by dotted key such as "train.lr".

    Paths, settings that do not change the results and settings that the run does not use are left out. Training
    settings that the record leaves out have their defaults.
    """
    spec, shared = record.run_spec, without_folders(record)["spec"]
    values = {part: shared[part] for part in PARTS if shared.get(part)}
    values |= {"poison": asdict(spec.poison), "policy": spec.policy}
    if spec.mixture is not None:
        used = shared["mixture"]
        trainings = {name: asdict(getattr(spec.mixture, name)) for name in TRAININGS if name in used}
        values["mixture"] = used | trainings
    values |= {"train": asdict(spec.train), "precision": spec.precision}
    unused = () if spec.attacked else OF_ATTACKS
    return {
        key: value for key, value in _flatten(values) if key not in LEFT_OUT and not key.startswith(unused)
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
