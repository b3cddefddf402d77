"""Read records: convert older schema versions, and check the values against the current schema."""

from __future__ import annotations

import functools
import math
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.records.record import (
    SCHEMA_VERSION,
    DataFacts,
    Environment,
    Record,
    TextFacts,
)

# Fields of `Record` that each schema version added. Records of older versions do not have them.
ADDED_IN = {
    2: {"parent", "stages", "scores", "verdict"},
    3: {"inputs", "judgements", "near_chance", "files", "model_sha256"},
    4: {"tasks", "gate_shares"},
}
REMOVED_IN = {3: {"parent", "scores", "verdict"}}
# Keys that every row of the history, and every metric, must have.
EPOCH_KEYS = {"epoch", "loss", "train_accuracy", "lr", "seconds"}
METRIC_KEYS = {"value", "n"}
# Records have about 10. Far more would exceed Python's recursion limit when a record is checked, copied or written.
MOST_LEVELS = 100


def parse_record(values: object, file: Path) -> Record:
    """Convert the content of a JSON file to a record.

    Args:
        values: The parsed content of the file.
        file: Path of the file, for error messages.

    Returns:
        The record, in the current schema version.

    Raises:
        RecordError: The record is damaged or has an unknown schema version.
    """
    if not isinstance(values, dict) or "schema_version" not in values:
        raise RecordError(f"record {file}: damaged: expected the key 'schema_version'")
    if _nests_too_deep(values):
        raise RecordError(f"record {file}: damaged: nested deeper than {MOST_LEVELS} levels")
    values = _upgrade(values, file)
    known = {item.name for item in fields(Record)}
    missing, extra = known - values.keys(), values.keys() - known
    if missing or extra:
        raise RecordError(f"record {file}: damaged: missing {sorted(missing)}, unknown {sorted(extra)}")
    if damage := _find_damage(values):
        raise RecordError(f"record {file}: damaged: {damage}")
    record = Record(**values)
    try:
        digest = record.run_spec.digest
    except ConfigError as error:
        raise RecordError(f"record {file}: damaged: {error}") from error
    if digest != record.digest:
        raise RecordError(
            f"record {file}: damaged: expected {digest}, the digest of its spec, found {record.digest}"
        )
    return record


def _nests_too_deep(values: object) -> bool:
    level = [values]
    for _ in range(MOST_LEVELS):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True


def _upgrade(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Convert the values of a record to the current schema version."""
    version = values["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise RecordError(f"record {file}: expected schema version 1 to {SCHEMA_VERSION}, found {version!r}")
    later = {name for since, names in ADDED_IN.items() if since > version for name in names}
    if early := sorted(later & values.keys()):
        raise RecordError(f"record {file}: damaged: schema version {version} does not have {early}")
    values = dict(values)
    if version < 2:
        values |= {"parent": None, "stages": [], "scores": {}, "verdict": {}}
    if version < 3:
        values = _upgrade_to_3(values, file)
    if version < 4:
        values |= {"tasks": [], "gate_shares": []}
    return {**values, "schema_version": SCHEMA_VERSION}


def _upgrade_to_3(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Convert `parent` to an input, and `scores` and `verdict` to judgements."""
    missing = sorted(REMOVED_IN[3] - values.keys())
    if missing:
        raise RecordError(f"record {file}: damaged: missing {missing}, unknown []")
    parent, scores, verdict = (values.pop(name) for name in ("parent", "scores", "verdict"))
    if not isinstance(scores, dict) or not isinstance(verdict, dict):
        raise RecordError(f"record {file}: damaged: 'scores' or 'verdict' is not a dict")
    if not isinstance(parent, str | None):
        raise RecordError(f"record {file}: damaged: 'parent' is not a string")
    inputs = [] if parent is None else [{"role": "parent", "run": parent, "digest": None, "sha256": None}]
    kinds = dict.fromkeys([*scores, *verdict])
    return {
        **values,
        "near_chance": None,
        "files": [],
        "model_sha256": None,
        "inputs": inputs,
        "judgements": [_judged(k, scores.get(k), verdict.get(k)) for k in kinds],
    }


def _judged(kind: str, scores: Any, verdict: Any) -> dict[str, Any]:
    """Convert an entry of `scores` and one of `verdict`, from schema version 2, to a judgement.

    Args:
        kind: Key of both entries: what was judged.
        scores: Usually scores by name. Values in any other format are stored in `details`.
        verdict: The decision, in any format. Values without a field in a judgement are stored in `details`.
    """
    said = dict(verdict) if isinstance(verdict, dict) else {} if verdict is None else {"verdict": verdict}
    chosen: Any = next((said.pop(key) for key in ("dropped", "reset", "masked") if key in said), [])
    threshold = said.pop("threshold", None)
    if scores is not None and not _is_flat(scores):
        said, scores = said | {"scores": scores}, None
    if not _is_number(threshold):
        said, threshold = said | {"threshold": threshold}, None
    return {
        # In schema version 2, "sample" meant an input. There were no judgements about training samples.
        "about": "input" if kind == "sample" else kind,
        "scores": scores,
        "threshold": threshold,
        "suspicious": [str(name) for name in (chosen if isinstance(chosen, list) else [chosen])],
        "reason": "",
        "details": said,
    }


def _is_number(value: Any) -> bool:
    """Whether a value is a number or null."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_flat(scores: Any) -> bool:
    return isinstance(scores, dict) and all(map(_is_number, scores.values()))


def is_epoch_row(row: object) -> bool:
    """Whether a value is the row of an epoch in the history: the keys `EPOCH_KEYS`, with finite numbers."""
    return (
        isinstance(row, dict)
        and row.keys() >= EPOCH_KEYS
        and all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
    )


def _find_damage(values: dict[str, Any]) -> str | None:
    """Return a description of the first value that does not match the schema, or None."""
    for name, annotation in _types_of(Record).items():
        if misfit := _misfit(values[name], annotation):
            return f"{name + misfit.path!r}: {misfit.text}"
    finished = values["status"] == "finished"
    data = TextFacts if "vocabulary" in values["data"] else DataFacts  # As `Record.is_text`.
    for name, facts in (("data", data), ("environment", Environment)):
        if (values[name] or finished) and (misfit := _misfit(values[name], facts)):
            return f"{name + misfit.path!r}: {misfit.text}"
    groups = [("metrics", values["metrics"])]
    groups += [(f"stages[{n}].metrics", stage["metrics"]) for n, stage in enumerate(values["stages"])]
    for where, group in groups:
        for name, metric in group.items():
            if not metric.keys() >= METRIC_KEYS or ("low" in metric) != ("high" in metric):
                return f"'{where}.{name}': expected value, n, and both or neither of low and high, found {metric!r}"
    for n, row in enumerate(values["history"]):
        if not row.keys() >= EPOCH_KEYS:
            return f"'history[{n}]': expected the keys {sorted(EPOCH_KEYS)}, found {row!r}"
    if values["poison"] is not None and "n" not in values["poison"]:
        return f"'poison': expected the key 'n', found {values['poison']!r}"
    return None


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    """The annotated types of a class; cached, since resolving them takes longer than checking a record."""
    return get_type_hints(kind, include_extras=True)


NAMES = {float: "a number", int: "an integer", str: "a string", dict: "a mapping", list: "a list"}


class Misfit(NamedTuple):
    """A part of a JSON value that does not match its type."""

    path: str
    """Its place in the value, such as ".spec.model" or "[3]"; empty for the value itself."""
    text: str
    """What was expected and what was found."""

    def within(self, place: str) -> Misfit:
        """Return the same, with a path that begins one step further out."""
        return Misfit(place + self.path, self.text)


def _misfit(value: Any, annotation: Any) -> Misfit | None:
    """Return the first part of a JSON value that does not match a type, or None if all match."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return None
    if origin in (Union, types.UnionType):
        found = [_misfit(value, choice) for choice in arguments]
        return None if None in found else found[0]
    if is_typeddict(annotation):
        return _misfit_of_keys(value, annotation)
    kind = origin or annotation
    if kind is types.NoneType:
        return None if value is None else Misfit("", f"expected null, found {value!r}")
    expected = (int, float) if kind is float else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        return Misfit("", f"expected {NAMES.get(kind, kind.__name__)}, found {value!r}")
    if isinstance(value, list):
        for n, item in enumerate(value):
            if misfit := _misfit(item, arguments[-1]):
                return misfit.within(f"[{n}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if misfit := _misfit(item, arguments[-1]):
                return misfit.within(f".{key}")
    return None


def _misfit_of_keys(value: Any, annotation: Any) -> Misfit | None:
    """Return the first part that does not match a `TypedDict`, or None if all match. Unknown keys are allowed."""
    if not isinstance(value, dict):
        return Misfit("", f"expected a mapping, found {value!r}")
    for key, kind in _types_of(annotation).items():
        optional = get_origin(kind) is NotRequired
        if key not in value:
            if optional:
                continue
            return Misfit("", f"expected the key {key!r}, found {value!r}")
        if misfit := _misfit(value[key], get_args(kind)[0] if optional else kind):
            return misfit.within(f".{key}")
    return None
