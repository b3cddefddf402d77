"""Models whose clean accuracy is near chance: detection, mark in tables, and description in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.ops.metrics import near_chance

if TYPE_CHECKING:
    from backdoorbench_moe.records import Record

# Mark next to the numbers of such a model in tables.
MARK = "†"
# The metrics that are marked: BA, which shows the collapse, and ASR, which is then meaningless.
MARKED = ("ba", "asr")
# A metric that exists only for a model behind an input filter.
FILTERED = "fpr"
MARK_LEGEND = f"{MARK} The clean accuracy is near chance: the model's ASR says nothing about the trigger."


def collapsed(record: Record) -> bool:
    """Return whether a run's model is near chance.

    The result is the record's field `near_chance`. Older records do not have this field; the result is then computed
    from BA and the chance rate, see `chance_of`. With an input filter, the BA of the stage before the filter is used,
    since BA counts rejected images as errors.

    Args:
        record: Record of a run. A run without BA, such as an unfinished one, is not near chance.
    """
    return is_near_chance(_fields(record))


def is_near_chance(record: Mapping[str, Any]) -> bool:
    """Return the result of `collapsed` for the fields of a `record.json` as plain values."""
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
        record: The fields of a record as plain values.

    Returns:
        The measured rate if the record contains it (`data["chance"]`, in percent). Otherwise 1 / classes, which is too
        low for unbalanced test sets. None if the classes are not known.
    """
    measured = record["data"].get("chance")
    if measured is not None:
        return float(measured) / 100
    classes = record["data"].get("classes")
    return 1 / len(classes) if classes else None


def collapse_line(record: Record) -> str | None:
    """Return a line that describes a run's model as near chance; None if it is not."""
    return describe_collapse(_fields(record))


def describe_collapse(record: Mapping[str, Any]) -> str | None:
    """Return the result of `collapse_line` for the fields of a record as plain values."""
    if not is_near_chance(record):
        return None
    chance, ba = chance_of(record), _own_ba(record)
    numbers = f" (BA {ba['value']:.2f}%, chance {100 * chance:.2f}%)" if ba and chance else ""
    if "asr" in record["metrics"]:
        meaning = "the model has not learned its task, and its ASR says nothing about the trigger"
    else:
        # Such as an imported model, which may have been trained on images with another normalisation.
        meaning = "the model has not learned its task, or its images were prepared differently in training"
    return f"near chance{numbers}: {meaning}"


def _own_ba(record: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the BA of the model without an input filter; None if it is not known."""
    metrics: Mapping[str, Any] = record["metrics"]
    if FILTERED in metrics:
        stages = record.get("stages") or []
        metrics = stages[-2]["metrics"] if len(stages) > 1 else {}
    return metrics.get("ba")


def _fields(record: Record) -> dict[str, Any]:
    names = ("metrics", "data", "near_chance", "stages")
    return {name: getattr(record, name, None) for name in names}
