"""Metrics of one record, including those of defense stages, and whether their model is near chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from backdoorbench_moe.collapse import is_near_chance
from backdoorbench_moe.engine.graph import PARENT, needs
from backdoorbench_moe.records import Record


def base_of(key: str) -> str:
    """Return the last part of a metric's key: "pruned.asr" -> "asr"."""
    return key.rpartition(".")[2]


def with_base(key: str, base: str) -> str:
    """Replace the last part of a metric's key: "pruned.cad" -> "pruned.ba"."""
    return ".".join([*key.split(".")[:-1], base])


def uses_twin(key: str) -> bool:
    """Return whether a metric depends on the clean twin: it is measured on the twin or compared with it."""
    base = base_of(key)
    return base == "cad" or base.startswith("twin_")


def find_value(record: Record, key: str) -> Mapping[str, float] | None:
    """Find a metric in a record.

    Args:
        record: The record.
        key: Key of the metric, such as "asr", "task/2.ba", "pruned.asr" or "seconds".

    Returns:
        {"value", "n", "low", "high"}; for "seconds" only {"value"}; None if the record does not have the metric.
    """
    if key in record.metrics:
        return record.metrics[key]
    if base_of(key) == "seconds":
        return _seconds(record, key.rpartition(".")[0])
    stage, _, name = key.partition(".")
    return _stage_metrics(record, stage).get(name)


def with_recovery(record: Record, others: Iterable[Record]) -> Record:
    """Add RA to the record of an undefended run; it is only measured before a defense of the run.

    Args:
        record: The record of a run.
        others: Records that include those of its defended runs.

    Returns:
        The record with RA; the same record if it has RA, or if none of the others measured it.
    """
    if "ra" in record.metrics or not record.run_spec.attacked:
        return record
    for other in others:
        parent = needs(other.run_spec).get(PARENT) if other.stages else None
        if parent is None or parent.digest != record.digest:
            continue
        if (found := other.stages[0]["metrics"].get("ra")) is not None:
            return replace(record, metrics={**record.metrics, "ra": found})
    return record


def is_of_collapsed_model(record: Record, key: str) -> bool:
    """Return whether the model on which a metric is measured (at the end of its stage, if any) is near chance."""
    metrics = _stage_metrics(record, key.partition(".")[0])
    # The record's own field refers to the final model.
    known = None if metrics else getattr(record, "near_chance", None)
    fields = {"data": record.data, "stages": record.stages, "near_chance": known}
    return is_near_chance({**fields, "metrics": metrics or record.metrics})


def _stage_metrics(record: Record, name: str) -> Mapping[str, Any]:
    return next((stage["metrics"] for stage in record.stages if stage["name"] == name), {})


def _seconds(record: Record, stage: str) -> Mapping[str, float] | None:
    """Return the seconds of a stage; if `stage` is empty, of the defense, or of the training of an undefended run."""
    if stage:
        found = next((each["seconds"] for each in record.stages if each["name"] == stage), None)
    else:
        found = record.timing.get("defense_seconds" if record.stages else "train_seconds")
    return None if found is None else {"value": found}
