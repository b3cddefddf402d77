"""What was run, one row a run, and on what."""

from __future__ import annotations

import json
from typing import Any

from backdoorbench_moe.bench.render import percent, write_csv
from backdoorbench_moe.bench.results import ResultSet
from backdoorbench_moe.bench.suite import FILTER_METRICS, METRICS, PARTS, value_of
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.records import Record

SPEC_COLUMNS = ("defenses", "poison_rate_percent", "target", "seed", "epochs")
MADE_COLUMNS = ("train_seconds", "images_per_second", "device", "precision", "threads", "torch", "git_commit")


def tidy_csv(results: ResultSet) -> str:
    """One row for each finished run, clean twins among them, as CSV; numbers as the records have them.

    ba, asr and ra stand with their Wilson 95% interval (`_low`, `_high`) and number of images (`_n`), and so do
    auroc, tpr and fpr where an input filter was run; `cad` is measured against the clean twin. A defense's
    stage has columns of its own, such as `pruned_asr`.
    """
    records = results.finished()
    stages = list(dict.fromkeys(stage["name"] for record in records for stage in record.stages))
    judged = [name for name in FILTER_METRICS if any(name in record.metrics for record in records)]
    prefixes = ("", *(f"{name}." for name in stages))
    metrics = [f"{stage}{metric}" for stage in prefixes for metric in (*METRICS, *judged)]
    parts = [column for part in PARTS for column in (part, f"{part}_options")]
    measured = [column for metric in metrics for column in _metric_columns(metric)]
    rows: list[list[Any]] = [
        ["suite", "version", "scale", *parts, *SPEC_COLUMNS, *measured, *MADE_COLUMNS, "digest"]
    ]
    for record in records:
        spec = record.run_spec
        row = [results.suite.name, results.suite.version, results.suite.scale]
        row += [text for part in PARTS for text in _part(spec, part)]
        rate = percent(spec.poison.rate)
        row += [value_of(spec, "defenses"), rate, spec.poison.target, spec.seed, spec.train.epochs]
        row += [value for metric in metrics for value in _measured(results, spec, metric)]
        rows.append([*row, *_made(record), record.digest])
    return write_csv([["" if value is None else value for value in row] for row in rows])


def environments(results: ResultSet) -> list[dict[str, Any]]:
    """The distinct environments the runs were made in, the most used first, each with its number of `runs`."""
    counts: dict[str, int] = {}
    for record in results.finished():
        text = json.dumps(record.environment, sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"runs": count, **json.loads(text)} for text, count in ordered]


def train_seconds(results: ResultSet) -> float:
    """Seconds of training of all finished runs together."""
    return sum(record.timing.get("train_seconds", 0.0) for record in results.finished())


def _part(spec: RunSpec, key: str) -> tuple[str, str]:
    """A part's name and its options."""
    name, _, options = (value_of(spec, key) or "none").partition(", ")
    return name, options


def _metric_columns(metric: str) -> list[str]:
    name = metric.replace(".", "_")
    return [name] if metric.endswith("cad") else [name, f"{name}_low", f"{name}_high", f"{name}_n"]


def _measured(results: ResultSet, spec: RunSpec, metric: str) -> list[Any]:
    if metric.endswith("cad"):
        return [results.value(spec, metric)]
    found = results.metric(spec, metric) or {}
    return [found.get(key) for key in ("value", "low", "high", "n")]


def _made(record: Record) -> list[Any]:
    made = record.environment
    timing = [record.timing.get("train_seconds"), record.timing.get("images_per_second")]
    keys = [made.get(key) for key in ("device", "precision", "threads")]
    return [*timing, *keys, made.get("packages", {}).get("torch"), made.get("git_commit")]
