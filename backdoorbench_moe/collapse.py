"""Models whose clean accuracy is near chance: how they are found, marked in tables and named in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.ops.metrics import near_chance

if TYPE_CHECKING:
    from backdoorbench_moe.records import Record

# Stands in tables beside the numbers of such a model.
MARK = "†"
# The metrics that are marked: what shows the collapse, and what it makes meaningless.
MARKED = ("ba", "asr")
# A metric that only a model behind an input filter has.
FILTERED = "fpr"
MARK_LEGEND = f"{MARK} The clean accuracy is near chance: the model's ASR says nothing about the trigger."


def collapsed(record: Record) -> bool:
    """Return whether a run's model is near chance.

    This is the record's field `near_chance`. For an older record, which does not have it, it is computed from BA and
    the chance rate; see `chance_of`. Behind an input filter it is the BA of the stage before, since BA counts rejected
    images as errors.

    Args:
        record: Record of a run; one without BA, such as an unfinished run's, is not near chance.
    """
    return is_near_chance(_fields(record))


def is_near_chance(record: Mapping[str, Any]) -> bool:
    """Do what `collapsed` does, for a record's fields as plain values, as `record.json` has them."""
    known = record.get("near_chance")
    if known is not None:
        return bool(known)
    ba, chance = _own_ba(record), chance_of(record)
    if ba is None or chance is None:
        return False
    return near_chance(round(ba["value"] * ba["n"] / 100), int(ba["n"]), chance)


def chance_of(record: Mapping[str, Any]) -> float | None:
    """Return the accuracy of a model that always predicts the most frequent class, in (0, 1].

    Args:
        record: A record's fields as plain values.

    Returns:
        The measured rate, `data["chance"]` in percent, if the record has it. Otherwise 1 / classes, which is too low
        for unbalanced test sets. None if the classes are not known.
    """
    measured = record["data"].get("chance")
    if measured is not None:
        return float(measured) / 100
    classes = record["data"].get("classes")
    return 1 / len(classes) if classes else None


def collapse_line(record: Record) -> str | None:
    """Return a line that says that a run's model is near chance; None if it is not."""
    return describe_collapse(_fields(record))


def describe_collapse(record: Mapping[str, Any]) -> str | None:
    """Do what `collapse_line` does, for a record's fields as plain values."""
    if not is_near_chance(record):
        return None
    chance, ba = chance_of(record), _own_ba(record)
    numbers = f" (BA {ba['value']:.2f}%, chance {100 * chance:.2f}%)" if ba and chance else ""
    return f"near chance{numbers}: the model has not learned its task, and its ASR says nothing about the trigger"


def _own_ba(record: Mapping[str, Any]) -> dict[str, float] | None:
    """BA of the model itself, without an input filter; None if it is not known."""
    metrics: Mapping[str, Any] = record["metrics"]
    if FILTERED in metrics:
        stages = record.get("stages") or []
        metrics = stages[-2]["metrics"] if len(stages) > 1 else {}
    return metrics.get("ba")


def _fields(record: Record) -> dict[str, Any]:
    names = ("metrics", "data", "near_chance", "stages")
    return {name: getattr(record, name, None) for name in names}
