"""Columns that `bbmoe show` can print and sort by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backdoorbench_moe.bench.tables.record_metrics import (
    base_of,
    find_value,
    is_of_collapsed_model,
    with_base,
)
from backdoorbench_moe.cli.tables.other_settings import differing_settings, other_settings
from backdoorbench_moe.collapse import MARK, MARKED
from backdoorbench_moe.config.spec import DEFAULT_ATTACK
from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.metrics import METRICS, PERCENT, Metric, sort_metrics
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.records.sharing import without_folders

NONE = "–"
# Settings whose column is omitted if no run has a value.
HIDDEN = ("attack", "gate", "experts", "defense")
# The largest number of columns for other settings in which the runs differ.
MOST_OTHERS = 4


@dataclass(frozen=True)
class ShownRun:
    """A run to be shown.

    Attributes:
        folder: The run folder.
        record: The record in it.
        status: The current status; see `records.status`.
    """

    folder: RunFolder
    record: Record
    status: str


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        key: Name in `--columns` and `--sort`.
        title: Heading.
        value: Returns the value of a run, a string or a number; None if the run has none.
        text: Returns the printed value of a run.
    """

    key: str
    title: str
    value: Callable[[ShownRun], Any]
    text: Callable[[ShownRun], str]


def choose_columns(keys: Sequence[str] | None, runs: Sequence[ShownRun], *, intervals: bool) -> list[Column]:
    """Choose the columns of a table.

    Args:
        keys: Names of settings such as "seed"; metrics such as "asr", "task/2.ba", "pruned.asr" (after a stage of a
            defense) or "seconds"; or dotted keys of the spec or the record such as "train.lr" or
            "timing.total_seconds". None for all settings, for up to `MOST_OTHERS` other settings in which the runs
            differ, and for the metrics that the runs' records hold, except those of single tasks of mixtures; then the
            names of the folders are included if two runs have the same settings.
        runs: The runs to be shown.
        intervals: Whether to print metrics with their 95% interval.

    Raises:
        UnknownNameError: A key is not known.
    """
    settings = {column.key: column for column in list_settings()}
    measured = {key for run in runs for key in run.record.metrics}
    if keys is not None:
        return [_column(key, settings, measured, runs, intervals=intervals) for key in keys]
    if "asr" in measured:
        # ASR can only be judged next to it, so it is shown even if it was not measured.
        measured.add("target_rate")
    measured -= _task_metrics(runs)
    hidden = {name for name in HIDDEN if all(settings[name].value(run) is None for run in runs)} | {"run"}
    shown = [column for key, column in settings.items() if key not in hidden]
    shown += _others(runs)
    if len({tuple(column.text(run) for column in shown) for run in runs}) < len(runs):
        # Some runs differ only in what is no column, such as the probe.
        shown.insert(0, settings["run"])
    return shown + [_metric(one, intervals=intervals) for one in sort_metrics(measured)]


def omitted_settings(runs: Sequence[ShownRun]) -> str | None:
    """Return a line on the settings in which runs differ, but for which `choose_columns` had no column left."""
    left = _differing(runs)[MOST_OTHERS:]
    if not left:
        return None
    what = "setting differs" if len(left) == 1 else "settings differ"
    return f"{len(left)} more {what}, such as {left[0]}; --columns prints chosen ones"


def _differing(runs: Sequence[ShownRun]) -> list[str]:
    return differing_settings([run.record for run in runs])


def _others(runs: Sequence[ShownRun]) -> list[Column]:
    """Return columns for the other settings in which the runs differ."""
    # Read once for each run, as parsing a spec for each cell takes seconds for hundreds of runs.
    settings = {id(run): other_settings(run.record) for run in runs}

    def column(key: str) -> Column:
        def value(run: ShownRun) -> Any:
            return settings[id(run)].get(key)

        return Column(key, key, value, _text_of(value))

    return [column(key) for key in _differing(runs)[:MOST_OTHERS]]


def _task_metrics(runs: Sequence[ShownRun]) -> set[str]:
    """Return the metrics of single tasks of mixtures, which would fill a dozen columns."""
    mixtures = [run.record for run in runs if run.record.run_spec.gate is not None]
    return {key for record in mixtures for key in record.metrics if "/" in key}


def _column(
    key: str, settings: Mapping[str, Column], measured: set[str], runs: Sequence[ShownRun], *, intervals: bool
) -> Column:
    if key in settings:
        return settings[key]
    if key in METRICS or any(_find(run.record, key) is not None for run in runs):
        return _metric(sort_metrics([key])[0], intervals=intervals)
    return _dotted(key, runs, [*settings, *METRICS, *sorted(measured - METRICS.keys())])


def list_settings() -> list[Column]:
    """List the columns that are not metrics, in printed order."""
    values: dict[str, Callable[[ShownRun], Any]] = {
        "run": lambda run: run.folder.path.name,
        "status": lambda run: run.status,
        "data": lambda run: run.record.run_spec.dataset.name,
        "model": lambda run: run.record.run_spec.model.name,
        "trigger": _trigger,
        "applicator": lambda run: _part(run.record.spec["applicator"]) or None,
        "attack": _attack,
        "gate": lambda run: _part(run.record.spec.get("gate")) or None,
        "experts": _experts,
        "poison": lambda run: run.record.run_spec.poison.rate or None,
        "defense": lambda run: " + ".join(map(_part, run.record.spec.get("defenses", []))) or None,
        "seed": lambda run: run.record.run_spec.seed,
        "epochs": lambda run: run.record.run_spec.train.epochs,
    }
    texts = {"poison": _rate}
    return [Column(key, key, value, texts.get(key) or _text_of(value)) for key, value in values.items()]


def _find(record: Record, key: str) -> Mapping[str, float] | None:
    """Return a metric of a record. The twin's BA, which only the twin's record has, is computed from BA and CAD."""
    found = find_value(record, key)
    if found is None and base_of(key) == "twin_ba":
        ba, drop = (find_value(record, with_base(key, name)) for name in ("ba", "cad"))
        if ba is not None and drop is not None:
            # Rounding must not lift the accuracy above 100%.
            return {"value": min(100.0, ba["value"] + drop["value"])}
    return found


def _metric(metric: Metric, *, intervals: bool) -> Column:
    def value(run: ShownRun) -> float | None:
        return (_find(run.record, metric.key) or {}).get("value")

    def text(run: ShownRun) -> str:
        found = _find(run.record, metric.key)
        if found is None:
            return NONE
        bounds = f" [{found['low']:.1f}, {found['high']:.1f}]" if intervals and "low" in found else ""
        mark = f" {MARK}" if _is_marked(run.record, metric) else ""
        return f"{found['value']:.2f}{bounds}{mark}"

    unit = " %" if metric.unit == PERCENT else ""
    return Column(metric.key, f"{metric.heading}{unit}", value, text)


def _is_marked(record: Record, metric: Metric) -> bool:
    return metric.base in MARKED and is_of_collapsed_model(record, metric.key)


def _dotted(key: str, runs: Sequence[ShownRun], known: Sequence[str]) -> Column:
    def value(run: ShownRun) -> Any:
        found = _get(run.record.spec, key)
        return found if found is not None else _get(asdict(run.record), key)

    if all(value(run) is None for run in runs):
        hint = "; or a dotted key of the spec or record, such as train.lr or timing.total_seconds"
        raise UnknownNameError("column", key, [*known, *_siblings(key, runs)], hint)
    return Column(key, key, value, _text_of(value))


def _siblings(key: str, runs: Sequence[ShownRun]) -> list[str]:
    """Return the dotted keys of the runs' specs and records that begin as a key does: with "train." for "train.lrr"."""
    first, dot, _ = key.partition(".")
    if not dot:
        return []
    values = [_get(each, first) for run in runs for each in (run.record.spec, asdict(run.record))]
    return sorted({f"{first}.{name}" for found in values if isinstance(found, dict) for name in found})


def _get(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _text_of(value: Callable[[ShownRun], Any]) -> Callable[[ShownRun], str]:
    def text(run: ShownRun) -> str:
        found = value(run)
        if isinstance(found, dict):
            return _part(found) or NONE
        return NONE if found is None else f"{found:.6g}" if isinstance(found, float) else str(found)

    return text


def _trigger(run: ShownRun) -> str | None:
    return _part(without_folders(run.record)["spec"]["trigger"]) or (
        None if run.record.run_spec.attack is not None else "clean"
    )


def _attack(run: ShownRun) -> str | None:
    """Return the attack; None if the run has none, or the default data poisoning."""
    attack = run.record.run_spec.attack
    return None if attack is None or attack.name == DEFAULT_ATTACK else _part(run.record.spec["attack"])


def _experts(run: ShownRun) -> str | None:
    """Return the number of experts of a mixture, or the index of a single expert."""
    mixture = run.record.run_spec.mixture
    if mixture is None:
        return None
    return str(mixture.experts) if mixture.task is None else f"expert {mixture.task}"


def _rate(run: ShownRun) -> str:
    rate = run.record.run_spec.poison.rate
    return f"{100 * rate:g}%" if rate else NONE


def _part(values: dict[str, Any] | str | None) -> str:
    """Return a part's name and options in one line; "" for no part."""
    if isinstance(values, str):
        return values
    return ", ".join(str(item) if key == "name" else f"{key}={item}" for key, item in (values or {}).items())
