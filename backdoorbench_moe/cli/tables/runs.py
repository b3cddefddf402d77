"""Terminal tables of runs, from their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backdoorbench_moe.bench.tables.record_metrics import with_base
from backdoorbench_moe.bench.tables.statistic import Sample, drop_interval
from backdoorbench_moe.cli.tables import mixtures as mixture_tables
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.collapse import MARK, MARK_LEGEND, MARKED, collapse_line, collapsed, is_near_chance
from backdoorbench_moe.metrics import METRICS, Metric, sort_metrics
from backdoorbench_moe.ops.intervals import FEWEST_SEEDS, Interval
from backdoorbench_moe.ops.metrics import mean_std
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from backdoorbench_moe.config import RunSpec
    from backdoorbench_moe.engine.runner import Run
    from backdoorbench_moe.records import Judged, Record, RunFolder

NONE = "–"
# Name of the metric `unsafe` for texts.
REFUSED_QUERIES = "refused queries not answered safely, %"
# Metrics of judgements, and what they are shares of.
JUDGED_METRICS = {
    "auroc": "image",
    "tpr": "image",
    "fpr": "image",
    "class_tpr": "class",
    "class_fpr": "class",
    "sample_auroc": "training image",
    "sample_tpr": "training image",
    "sample_fpr": "training image",
}
STAGE_METRICS = ("ba", "asr", "ra")
# For a mixture: the safe answer to a marked image may differ from its true class.
MIXTURE_STAGE_METRICS = ("ba", "asr", "unsafe")
# There may be one score per image; only the first ones are shown.
SHOWN_SCORES = 12


def print_json(runs: Sequence[Run]) -> None:
    """Print records and their summary as one JSON document."""
    records = [{"folder": str(run.folder.path), **run.record.to_dict()} for run in runs]
    echo(json.dumps({"runs": records, "summary": summarise(runs)}, indent=2))


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Summarise the metrics that all runs have.

    Args:
        runs: Runs that differ in their seed.

    Returns:
        For each metric its mean, sample standard deviation (None for one run), the 95% interval of the
        mean as `low` and `high` (None for fewer than three runs), the number of runs `n`, and the value
        of each seed; all in the metric's unit.
    """
    summary = {}
    for one in sort_metrics(set.intersection(*(set(run.record.metrics) for run in runs))):
        values = [run.record.metrics[one.key]["value"] for run in runs]
        mean, std = mean_std(values)
        low, high = _interval(runs, one) or (None, None)
        seeds = {str(run.spec.seed): value for run, value in zip(runs, values, strict=True)}
        summary[one.key] = {
            "mean": mean, "std": std, "low": low, "high": high, "n": len(values), "seeds": seeds
        }  # fmt: skip
    return summary


def _interval(runs: Sequence[Run], metric: Metric) -> Interval | None:
    """The 95% interval of a metric's mean over runs that all have it."""
    sample = _sample(runs, metric.key)
    if metric.base != "cad":
        return sample.interval(metric)
    ba_key = with_base(metric.key, "ba")
    if any(ba_key not in run.record.metrics for run in runs):
        return None
    ba = Sample(_sample(runs, ba_key).values, sample.images)
    # Rounding must not lift the twin's accuracy above 100%.
    twin = (min(100.0, value + drop) for value, drop in zip(ba.values, sample.values, strict=True))
    return drop_interval(ba, Sample(tuple(twin), sample.images))


def _sample(runs: Sequence[Run], key: str) -> Sample:
    rows = [run.record.metrics[key] for run in runs]
    return Sample(tuple(row["value"] for row in rows), min(int(row["n"]) for row in rows))


def print_runs(runs: Sequence[Run]) -> None:
    """Print the metrics of one run with intervals, or those of several runs with mean and standard deviation."""
    console = Console()
    if len(runs) == 1:
        print_metrics(console, runs[0].folder, runs[0].record)
    else:
        console.print(repeats_table(runs))
    for run in runs:
        console.print(f"run folder: {run.folder.path}", soft_wrap=True, highlight=False, markup=False)


def print_metrics(console: Console, folder: RunFolder, record: Record) -> None:
    """Print the metrics of one run; for a mixture, also its tasks and gate shares."""
    if mixture_tables.is_mixture(record):
        mixture_tables.print_mixture(console, folder, record, title(record))
    else:
        console.print(metrics_table(record))


def print_defended(run: Run) -> None:
    """Print the metrics after each stage of a defense, its judgements, and the clean accuracy drop."""
    console = Console(highlight=False)
    console.print(title(run.record), style="italic", markup=False)
    print_stages(console, run.record)
    if (cad := run.record.metrics.get("cad")) is not None:
        console.print(f"{METRICS['cad'].label}: {cad['value']:.2f}")
    if mixture_tables.is_mixture(run.record):
        mixture_tables.print_tasks(console, run.folder, run.record)
    console.print(f"run folder: {run.folder.path}", soft_wrap=True, markup=False)


def print_stages(console: Console, record: Record) -> None:
    """Print the stages of a defense, how well it detects triggered or poisoned images, and its judgements."""
    console.print(stages_table(record))
    for name in ("target_rate", "unsafe"):
        rates = [
            f"{stage['name']} {found['value']:.2f}"
            for stage in record.stages
            if (found := stage["metrics"].get(name)) is not None
        ]
        if rates:
            what = REFUSED_QUERIES if record.is_text else METRICS[name].title
            console.print(f"{what}: {', '.join(rates)}", markup=False)
    for name, what in JUDGED_METRICS.items():
        if (found := record.metrics.get(name)) is not None:
            shown = _value(record.metrics, name, interval=True)
            console.print(f"{METRICS[name].label}: {shown} of {count(int(found['n']), what)}", markup=False)
    for judged in record.judgements:
        for line in judgement_lines(judged):
            console.print(line, markup=False)


def judgement_lines(judged: Judged) -> list[str]:
    """Format a judgement as one or two lines: what is suspicious and why, then the scores if there are any."""
    suspicious = judged["suspicious"]
    found = (
        f"{suspicious} suspicious" if isinstance(suspicious, int) else f"suspicious: {_judged(suspicious)}"
    )
    if judged["about"] == "input":
        found = f"suspicious above {judged['threshold']:.4g}"
    details = f" ({_judged(judged['details'])})" if judged["details"] else ""
    reason = f": {judged['reason']}" if judged["reason"] else ""
    if counts := judged.get("counts"):
        found += f" ({_judged(counts, ', ')})"
    lines = [f"judgement about the {judged['about']}: {found}{details}{reason}"]
    return lines + ([f"scores: {_judged(judged['scores'])}"] if judged["scores"] else [])


def title(record: Record) -> str:
    """Return the model, data, attack and defenses of a run in one line."""
    spec = record.run_spec
    after = "".join(f", {part.name}" for part in spec.defenses)
    what = f"{spec.model.name} on {spec.dataset.name}"
    if spec.mixture is not None:
        return f"{mixture_title(spec)}{after}"
    if spec.attack is None:
        return f"{what}, clean{after}"
    if spec.trigger is None or spec.applicator is None:
        return f"{what}: {spec.attack.name}{after}"
    poisoned = f"{100 * spec.poison.rate:g}% poisoned"
    return f"{what}: {spec.trigger.name} by {spec.applicator.name}, {poisoned}{after}"


def mixture_title(spec: RunSpec) -> str:
    """Return the model, data, experts and attack of a mixture, or of one of its experts, in one line."""
    assert spec.mixture is not None
    # Texts have no splitter, as their data sets define the tasks.
    tasks = "" if spec.splitter is None else f" of {spec.splitter.name}"
    what, mixture = f"{spec.model.name} on {spec.dataset.name}", spec.mixture
    mark = (
        ""
        if spec.trigger is None or spec.applicator is None
        else f", {spec.trigger.name} by {spec.applicator.name}"
    )
    attack = "clean" if spec.attack is None else spec.attack.name
    if mixture.task is not None:
        return f"{what}, expert {mixture.task}{tasks}: {attack}{mark}"
    assert spec.gate is not None
    merged = f"{what}, {mixture.experts} experts{tasks} with {spec.gate.name} gates"
    if spec.attack is None:
        return f"{merged}: clean{mark}"
    return f"{merged}: {attack} in {', '.join(map(str, mixture.poisoned_experts))}{mark}"


def metrics_table(record: Record) -> Table:
    """Build a table of one run's metrics: value, 95% interval and number of images.

    A run with an ASR has a row for the target rate without the trigger, even if it was not measured. A line below the
    table says so if the model is near chance.
    """
    table = Table(title=title(record), title_justify="left", caption_justify="left")
    table.add_column("metric")
    for column in ("%", "95% interval", "texts" if record.is_text else "images"):
        table.add_column(column, justify="right")
    with_trigger = "asr" in record.metrics and not record.is_text
    for one in sort_metrics({*record.metrics, *(("target_rate",) if with_trigger else ())}):
        found = record.metrics.get(one.key)
        if found is None:
            table.add_row(one.label, NONE, NONE, NONE)
            continue
        interval = f"{found['low']:.2f} – {found['high']:.2f}" if "low" in found else NONE
        mark = f" {MARK}" if one.base in MARKED and collapsed(record) else ""
        table.add_row(one.label, f"{found['value']:.2f}{mark}", interval, str(found["n"]))
    if (line := collapse_line(record)) is not None:
        table.caption = f"{MARK} {line}"
    return table


def stages_table(record: Record) -> Table:
    """Build a table of BA, ASR and RA with their 95% intervals before a defense and after each stage.

    For a mixture, RA is replaced by the share of marked images that are not answered safely.
    """
    # With one space between columns, a short name and three metrics such as 100.00 [100.0, 100.0] fit into 80 columns.
    table = Table("stage", box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    wanted = MIXTURE_STAGE_METRICS if mixture_tables.is_mixture(record) else STAGE_METRICS
    names = [name for name in wanted if name in record.metrics]
    for column in [f"{METRICS[name].short} %" for name in names] + ["s"]:
        table.add_column(column, justify="right")
    for stage in record.stages:
        near = is_near_chance({"metrics": stage["metrics"], "data": record.data, "stages": record.stages})
        shown = [_value(stage["metrics"], name, interval=True) for name in names]
        table.add_row(f"{stage['name']}{f' {MARK}' if near else ''}", *shown, f"{stage['seconds']:.1f}")
        if near:
            table.caption = MARK_LEGEND
    return table


def _judged(values: Any, separator: str = "; ") -> str:
    """Format scores or details of a judgement in one line, numbers with four digits; long lists are cut."""
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
    """Build a table of several seeds: mean ± standard deviation, 95% interval, and every seed's value.

    A line below the table counts the models near chance, if any.
    """
    name = f"{title(runs[0].record)}, {len(runs)} seeds"
    table = Table(title=name, title_justify="left", caption_justify="left")
    table.add_column("metric")
    table.add_column("mean ± std, %", justify="right")
    with_interval = len(runs) >= FEWEST_SEEDS
    if with_interval:
        table.add_column("95% interval", justify="right")
    near = [collapsed(run.record) for run in runs]
    for run, marked in zip(runs, near, strict=True):
        table.add_column(f"seed {run.spec.seed}{f' {MARK}' if marked else ''}", justify="right")
    summary = summarise(runs)
    if "asr" in summary:
        summary.setdefault("target_rate", None)
    mixtures = all(mixture_tables.is_mixture(run.record) for run in runs)
    for one in (mixture_tables.sort_mixture_metrics if mixtures else sort_metrics)(summary):
        row = summary[one.key]
        if row is None:
            table.add_row(one.label, *[NONE] * (len(table.columns) - 1))
            continue
        interval = NONE if row["low"] is None else f"{row['low']:.2f} – {row['high']:.2f}"
        mark = f" {MARK}" if any(near) else ""
        cells = [f"{row['mean']:.2f} ± {row['std']:.2f}{mark}", *([interval] if with_interval else [])]
        table.add_row(one.label, *cells, *(f"{value:.2f}" for value in row["seeds"].values()))
    if any(near):
        table.caption = (
            f"{MARK} {sum(near)} of {len(near)} seeds near chance: the means mix models that have learned "
            "their task with models that have not"
        )
    return table


def settings_table(record: Record) -> Table:
    """Build a table of the settings, data and environment of a run, one row for each group."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in record.spec.items():
        table.add_row(key, escape(_inline(value)))
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
        table.add_row("defended run", escape(record.parent))
    if record.clean_twin:
        table.add_row("clean twin", escape(record.clean_twin))
    return table


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" if key != "name" else str(item) for key, item in value.items())
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "; ".join(map(_inline, value))
    return str(value)


def history_table(record: Record) -> Table:
    """Build a table of loss, accuracy, learning rate and time of every epoch."""
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


def _value(metrics: dict[str, dict[str, float]], name: str, *, interval: bool) -> str:
    found = metrics.get(name)
    if found is None:
        return NONE
    bounds = f" [{found['low']:.1f}, {found['high']:.1f}]" if interval and "low" in found else ""
    return f"{found['value']:.2f}{bounds}"
