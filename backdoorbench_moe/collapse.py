"""Models near chance: found in a record, marked in tables, and said in one line."""

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
MARK_LEGEND = f"{MARK} The clean accuracy is near chance: the model's ASR says nothing about the trigger."


def collapsed(record: Record) -> bool:
    """Tell whether a run's model is near chance.

    The record's own field `near_chance` decides. Where a record has none, because it is older, it is
    computed from BA and the chance rate; see `chance_of`.

    Args:
        record: Record of a run; one without BA, such as an unfinished run's, is not near chance.
    """
    return is_near_chance(_fields(record))


def is_near_chance(record: Mapping[str, Any]) -> bool:
    """Tell the same of a record's fields as plain values, as `record.json` has them."""
    known = record.get("near_chance")
    if known is not None:
        return bool(known)
    ba, chance = record["metrics"].get("ba"), chance_of(record)
    if ba is None or chance is None:
        return False
    return near_chance(round(ba["value"] * ba["n"] / 100), int(ba["n"]), chance)


def chance_of(record: Mapping[str, Any]) -> float | None:
    """Give the accuracy of always answering the most frequent class, in (0, 1].

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
    """Say in one line that a run's model is near chance; None if it is not."""
    return describe_collapse(_fields(record))


def describe_collapse(record: Mapping[str, Any]) -> str | None:
    """Say the same of a record's fields as plain values."""
    if not is_near_chance(record):
        return None
    chance, ba = chance_of(record), record["metrics"].get("ba")
    numbers = f" (BA {ba['value']:.2f}%, chance {100 * chance:.2f}%)" if ba and chance else ""
    return f"near chance{numbers}: the model has not learned its task, and its ASR says nothing about the trigger"


def _fields(record: Record) -> dict[str, Any]:
    names = ("metrics", "data", "near_chance")
    return {name: getattr(record, name, None) for name in names}
