"""What the terminal shows of runs, drawn from their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from backdoorbench_moe.cli.streams import echo
from backdoorbench_moe.ops.metrics import mean_std

if TYPE_CHECKING:
    from backdoorbench_moe.engine.runner import Run
    from backdoorbench_moe.records import Record

METRICS = {
    "ba": "clean accuracy (BA)",
    "asr": "attack success rate (ASR)",
    "ra": "accuracy on triggered images (RA)",
    "cad": "clean accuracy drop (CAD)",
    "auroc": "area under the ROC curve (AUROC)",
    "tpr": "triggered images rejected (TPR)",
    "fpr": "clean images rejected (FPR)",
}
FILTER_METRICS = ("auroc", "tpr", "fpr")
# Of a defense's scores, which may be one an image, so many are shown.
SHOWN_SCORES = 12


def print_json(runs: Sequence[Run]) -> None:
    """Print records and their summary as one JSON document."""
    records = [{"folder": str(run.folder.path), **asdict(run.record)} for run in runs]
    echo(json.dumps({"runs": records, "summary": summarise(runs)}, indent=2))


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean, standard deviation and every seed's value of each metric all runs have, in percent."""
    summary = {}
    for metric in METRICS:
        if all(metric in run.record.metrics for run in runs):
            values = [run.value(metric) for run in runs]
            mean, std = mean_std(values)
            seeds = {str(run.spec.seed): value for run, value in zip(runs, values, strict=True)}
            summary[metric] = {"mean": mean, "std": std, "n": len(values), "seeds": seeds}
    return summary


def print_runs(runs: Sequence[Run]) -> None:
    """Print one run's metrics with their intervals, or several runs' with mean and deviation."""
    console = Console()
    console.print(metrics_table(runs[0].record) if len(runs) == 1 else repeats_table(runs))
    for run in runs:
        console.print(f"run folder: {run.folder.path}", soft_wrap=True, highlight=False, markup=False)


def print_defended(run: Run) -> None:
    """Print what a defense did, stage by stage, what it judged, and what it cost against the clean twin."""
    console = Console(highlight=False)
    console.print(title(run.record), style="italic", markup=False)
    print_stages(console, run.record)
    if (cad := run.record.metrics.get("cad")) is not None:
        console.print(f"{METRICS['cad']}: {cad['value']:.2f}")
    console.print(f"run folder: {run.folder.path}", soft_wrap=True, markup=False)


def print_stages(console: Console, record: Record) -> None:
    """Print the stages of a defense, how well its filter tells images apart, and its scores and verdict."""
    console.print(stages_table(record))
    for name in FILTER_METRICS:
        if (metric := record.metrics.get(name)) is not None:
            shown = _metric(record.metrics, name, interval=True)
            console.print(f"{METRICS[name]}: {shown} of {metric['n']} images", markup=False)
    for what, judged in (("scores", record.scores), ("verdict", record.verdict)):
        for kind, values in judged.items():
            console.print(f"{what} by {kind}: {_judged(values)}", markup=False)


def title(record: Record) -> str:
    """What was done, in one line."""
    spec = record.run_spec
    after = "".join(f", {part.name}" for part in spec.defenses)
    if spec.trigger is None or spec.applicator is None:
        return f"{spec.model.name} on {spec.dataset.name}, clean{after}"
    return (
        f"{spec.model.name} on {spec.dataset.name}: {spec.trigger.name} by {spec.applicator.name}, "
        f"{100 * spec.poison.rate:g}% poisoned{after}"
    )


def metrics_table(record: Record) -> Table:
    """Metric, value, 95% Wilson interval and number of images."""
    table = Table(title=title(record), title_justify="left")
    table.add_column("metric")
    for column in ("%", "95% interval", "images"):
        table.add_column(column, justify="right")
    for name, text in METRICS.items():
        if (metric := record.metrics.get(name)) is not None:
            interval = f"{metric['low']:.2f} – {metric['high']:.2f}" if "low" in metric else "–"
            table.add_row(text, f"{metric['value']:.2f}", interval, str(metric["n"]))
    return table


def stages_table(record: Record) -> Table:
    """BA, ASR and RA with their 95% intervals before the defense and after each of its stages."""
    # One blank between columns: three metrics of 100.00 [100.0, 100.0] and a short name fit 80 columns.
    table = Table("stage", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = [name for name in ("ba", "asr", "ra") if name in record.metrics]
    for column in [f"{name.upper()} %" for name in names] + ["s"]:
        table.add_column(column, justify="right")
    for stage in record.stages:
        shown = (_metric(stage["metrics"], name, interval=True) for name in names)
        table.add_row(stage["name"], *shown, f"{stage['seconds']:.1f}")
    return table


def _judged(values: Any, separator: str = "; ") -> str:
    """Scores or a verdict in one line, numbers with four digits; of long ones, the beginning."""
    if isinstance(values, dict):
        parts = [f"{name} {_judged(value, ', ')}" for name, value in values.items()]
    elif isinstance(values, list):
        parts, separator = [_judged(value) for value in values], ", "
    elif isinstance(values, float):
        return f"{values:.4g}"
    else:
        return str(values)
    more = [f"… ({len(parts)} in all)"] if len(parts) > SHOWN_SCORES else []
    return separator.join(parts[:SHOWN_SCORES] + more) or "none"


def repeats_table(runs: Sequence[Run]) -> Table:
    """Metric, mean ± standard deviation over seeds, and every seed's value."""
    table = Table(title=f"{title(runs[0].record)}, {len(runs)} seeds", title_justify="left")
    table.add_column("metric")
    table.add_column("mean ± std, %", justify="right")
    for run in runs:
        table.add_column(f"seed {run.spec.seed}", justify="right")
    for name, row in summarise(runs).items():
        mean = f"{row['mean']:.2f} ± {row['std']:.2f}"
        table.add_row(METRICS[name], mean, *(f"{value:.2f}" for value in row["seeds"].values()))
    return table


def settings_table(record: Record) -> Table:
    """What the run was made from and on, one line a group of settings."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in record.spec.items():
        table.add_row(key, _inline(value))
    if record.poison:
        table.add_row("poisoned images", str(record.poison["n"]))
    if record.data:
        table.add_row("data digest", record.data["digest"][:16])
    environment = record.environment
    if environment:
        packages = environment["packages"]
        table.add_row(
            "made with",
            f"backdoorbench_moe {packages['backdoorbench-moe']}, torch {packages['torch']}, "
            f"{environment['device']}, {environment['precision']}, {environment['threads']} threads",
        )
    if record.timing:
        table.add_row("timing", _inline({k: round(v, 2) for k, v in record.timing.items()}))
    if record.parent:
        table.add_row("defended run", record.parent)
    if record.clean_twin:
        table.add_row("clean twin", record.clean_twin)
    return table


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" if key != "name" else str(item) for key, item in value.items())
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "; ".join(map(_inline, value))
    return str(value)


def history_table(record: Record) -> Table:
    """Loss, accuracy, learning rate and time of every epoch."""
    table = Table("epoch", "loss", "train accuracy %", "lr", "seconds", box=None, pad_edge=False)
    for row in record.history:
        shown = (
            f"{row['loss']:.4f}",
            f"{row['train_accuracy']:.2f}",
            f"{row['lr']:.4g}",
            f"{row['seconds']:.1f}",
        )
        table.add_row(str(row["epoch"]), *shown)
    return table


RUN_COLUMNS = ("data", "model", "trigger", "applicator", "poison", "seed", "epochs", "BA %", "ASR %", "CAD")


def run_row(record: Record, *, intervals: bool = True) -> list[str]:
    """One run as a row under RUN_COLUMNS; metrics with their 95% interval, if wanted."""
    spec = record.run_spec
    parts = (spec.trigger, spec.applicator)
    names = ["clean" if part is None else _inline(part.to_dict()) for part in parts]
    rate = "–" if spec.is_clean else f"{100 * spec.poison.rate:g}%"
    return [
        spec.dataset.name,
        " + ".join([spec.model.name, *(_inline(part.to_dict()) for part in spec.defenses)]),
        *(["clean", "–"] if spec.is_clean else names),
        rate,
        str(spec.seed),
        str(spec.train.epochs),
        *(_metric(record.metrics, name, interval=intervals) for name in ("ba", "asr", "cad")),
    ]


def runs_table(records: Sequence[Record]) -> Table:
    """Several runs, one a row; without intervals, so that 80 columns will do."""
    table = Table(box=None, pad_edge=False)
    for column in RUN_COLUMNS:
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(*run_row(record, intervals=False))
    return table


def markdown_table(records: Sequence[Record]) -> str:
    """Several runs as a Markdown table, one a row."""
    rows = [list(RUN_COLUMNS), ["---"] * len(RUN_COLUMNS), *map(run_row, records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _metric(metrics: dict[str, dict[str, float]], name: str, *, interval: bool) -> str:
    metric = metrics.get(name)
    if metric is None:
        return "–"
    bounds = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if interval and "low" in metric else ""
    return f"{metric['value']:.2f}{bounds}"
