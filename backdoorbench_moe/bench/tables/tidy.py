"""Tidy CSV with one row per run of a suite, and the environments of the runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from backdoorbench_moe.bench.suites.suite import PARTS, value_of
from backdoorbench_moe.bench.tables.render import percent, write_csv
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.collapse import collapsed
from backdoorbench_moe.config import SURROGATE, RunSpec
from backdoorbench_moe.metrics import sort_metrics
from backdoorbench_moe.records import Record

# Parts of the spec and other columns that are only present if a run is a mixture.
MIXTURE_PARTS = ("splitter", "gate")
MIXTURE_COLUMNS = {
    "policy": "policy",
    "experts": "mixture.experts",
    "poisoned_experts": "mixture.poisoned_experts",
    "task": "mixture.task",
}
SPEC_COLUMNS = ("defenses", "poison_rate_percent", "target", "seed", "epochs")
MADE_COLUMNS = ("train_seconds", "images_per_second", "device", "precision", "threads", "torch", "git_commit")
# Metrics with columns in every file, so that code can read several files alike.
ALWAYS = ("ba", "asr", "target_rate", "ra", "cad")


def tidy_csv(results: ResultSet) -> str:
    """Return the table of `tidy_rows` as CSV; missing values are empty."""
    head, rows = _table(results)
    return write_csv([head, *([("" if value is None else value) for value in row] for row in rows)])


def tidy_rows(results: ResultSet) -> list[dict[str, Any]]:
    """Return one row per finished run, including clean twins, as values by column.

    Numbers are those of the records, unrounded. Each metric has its value, its 95% interval (`_low`, `_high`) and its
    number of images (`_n`); `cad` has only its value, computed from the clean twin. Metrics of defense stages have
    separate columns, such as `pruned_asr`. `near_chance` states whether the model is near chance. The base and the
    experts of a mixture also have rows; `task` is the number of an expert. Missing values are None.
    """
    head, rows = _table(results)
    return [dict(zip(head, row, strict=True)) for row in rows]


def _table(results: ResultSet) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the columns, and the rows; see `tidy_rows`."""
    records = results.finished()
    metrics = _metrics(records)
    mixtures = any(record.run_spec.mixture for record in records)
    surrogates = any(record.run_spec.surrogate for record in records)
    shown = {**dict.fromkeys(MIXTURE_PARTS, mixtures), SURROGATE: surrogates}
    kinds = [part for part in PARTS if shown.get(part, True)]
    parts = [column for part in kinds for column in (part, f"{part}_options")]
    made = MIXTURE_COLUMNS if mixtures else {}
    measured = [column for key in metrics for column in _metric_columns(key)]
    head = ["suite", "version", "scale", *parts, *made, *SPEC_COLUMNS, *measured, "near_chance"]
    rows: list[list[Any]] = []
    for record in records:
        spec = record.run_spec
        row: list[Any] = [results.suite.name, results.suite.version, results.suite.scale]
        row += [text for part in kinds for text in _part(spec, part)]
        row += [value_of(spec, key) for key in made.values()]
        rate = percent(spec.poison.rate)
        row += [value_of(spec, "defenses"), rate, spec.poison.target, spec.seed, spec.train.epochs]
        row += [value for key in metrics for value in _measured(results, spec, key)]
        row.append("yes" if collapsed(record) else "no")
        rows.append([*row, *_made(record), record.digest])
    return [*head, *MADE_COLUMNS, "digest"], rows


def environments(results: ResultSet) -> list[dict[str, Any]]:
    """List the distinct environments of the runs, the most used first.

    Returns:
        Each environment with its number of `runs` and, instead of the date of a run, the first and the last of their
        `dates`, ignoring records without a date.
    """
    dates: dict[str, list[str | None]] = {}
    for record in results.finished():
        made = dict(record.environment)
        date = cast("str | None", made.pop("date", None))
        dates.setdefault(json.dumps(made, sort_keys=True), []).append(date)
    ordered = sorted(dates.items(), key=lambda item: (-len(item[1]), item[0]))
    return [{"runs": len(found), **json.loads(text), **_ends(found)} for text, found in ordered]


def _ends(dates: Iterable[str | None]) -> dict[str, list[str]]:
    """Return the first and the last of these dates, which may be equal; empty if none is known."""
    known = sorted({date for date in dates if date is not None})
    return {"dates": [known[0], known[-1]]} if known else {}


def train_seconds(results: ResultSet) -> float:
    """Add up the training time of all finished runs, in seconds."""
    return sum(record.timing.get("train_seconds", 0.0) for record in results.finished())


def _metrics(records: Iterable[Record]) -> list[str]:
    """Return the keys of the metrics that have columns: those of the runs, then those of each stage."""
    whole = dict.fromkeys(ALWAYS)
    stages: dict[str, dict[str, None]] = {}
    for record in records:
        whole |= dict.fromkeys(record.metrics)
        for stage in record.stages:
            found = stages.setdefault(stage["name"], dict.fromkeys(("cad",)))
            found |= dict.fromkeys(stage["metrics"])
    keys = [one.key for one in sort_metrics(whole)]
    return keys + [f"{name}.{one.key}" for name, found in stages.items() for one in sort_metrics(found)]


def _part(spec: RunSpec, key: str) -> tuple[str, str]:
    """Return a part's name and its options."""
    name, _, options = (value_of(spec, key) or "none").partition(", ")
    return name, options


def _is_cad(key: str) -> bool:
    return key.rpartition(".")[2] == "cad"


def _metric_columns(key: str) -> list[str]:
    name = key.replace(".", "_").replace("/", "_")
    return [name] if _is_cad(key) else [name, f"{name}_low", f"{name}_high", f"{name}_n"]


def _measured(results: ResultSet, spec: RunSpec, key: str) -> list[Any]:
    if _is_cad(key):
        return [results.value(spec, key)]
    found = results.metric(spec, key) or {}
    return [found.get(name) for name in ("value", "low", "high", "n")]


def _made(record: Record) -> list[Any]:
    made = record.environment
    timing = [record.timing.get("train_seconds"), record.timing.get("images_per_second")]
    keys = [made.get(key) for key in ("device", "precision", "threads")]
    return [*timing, *keys, made.get("packages", {}).get("torch"), made.get("git_commit")]
