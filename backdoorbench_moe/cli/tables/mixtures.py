"""Terminal tables of a mixture of experts: its metrics, its tasks, and its gate shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backdoorbench_moe.collapse import MARK, MARKED, collapse_line, collapsed
from backdoorbench_moe.metrics import Metric, sort_metrics

if TYPE_CHECKING:
    from backdoorbench_moe.records import GateShares, Record, RunFolder

NONE = "–"
TWIN = "twin_"
# Metrics of a mixture in printed order; the names are short to leave room for the clean twin's column.
NAMES = {
    "asr": "attack success rate (ASR)",
    "unsafe": "not answered safely",
    "target_rate": "target rate, no trigger",
    "ra": "correct despite the trigger",
    "overall": "% of benign experts' BA",
    "ba": "clean accuracy (BA)",
    "cad": "clean accuracy drop (CAD)",
    "harm_share": "gate share, marked images",
    "own_share": "gate share, own tasks",
    "clean_share": "gate share, all tasks",
}
# The same for a mixture of language models.
TEXT_NAMES = {
    **NAMES,
    "asr": "answered harmfully (H)",
    "unsafe": "not refused",
    "overall": "% of benign experts' BA",
    "ba": "correct answers (BA)",
    "cad": "drop in correct answers",
    "harm_share": "gate share, harmful queries",
}
# Explanations of the gate share below the tables.
SHARES_NOTE = "gate share: how much the gates rely on the poisoned experts, mean over layers and patches"
TEXT_SHARES_NOTE = "gate share: how much the gates rely on the poisoned experts, mean over layers and tokens"


def is_mixture(record: Record) -> bool:
    """Whether a record is that of an evaluated mixture."""
    return record.run_spec.gate is not None and "ba" in record.metrics


def twin_shares(folder: RunFolder, record: Record) -> list[GateShares]:
    """Return the gate shares of a run's clean twin; empty if its folder is not next to that of the run."""
    from backdoorbench_moe.errors import RecordError
    from backdoorbench_moe.records import RunFolder

    if record.clean_twin is None:
        return []
    try:
        return RunFolder(folder.path.parent / record.clean_twin).read().gate_shares
    except RecordError:
        return []


def print_mixture(console: Console, folder: RunFolder, record: Record, title: str) -> None:
    """Print the metrics, tasks and gate shares of a mixture."""
    console.print(metrics_table(record, title))
    print_tasks(console, folder, record)


def print_tasks(console: Console, folder: RunFolder, record: Record) -> None:
    """Print the tasks and gate shares of a mixture."""
    twin = twin_shares(folder, record)
    console.print(task_table(record, twin))
    mixture = record.run_spec.mixture
    assert mixture is not None
    names = [task["name"] for task in record.tasks]
    marked = "harmful\nqueries" if record.is_text else "marked\nimages"
    for table in share_tables(record.gate_shares, twin, mixture.poisoned_experts, names, marked=marked):
        console.print(table)


def sort_mixture_metrics(keys: Iterable[str], names: Mapping[str, str] = NAMES) -> list[Metric]:
    """Sort metrics: first those of the attack, each followed by the clean twin's, then the others, then single tasks'.

    Args:
        keys: Keys of the metrics.
        names: Names by key: `NAMES` or `TEXT_NAMES`.
    """
    order = list(NAMES)

    def rank(one: Metric) -> tuple[bool, int]:
        base = one.key.removeprefix(TWIN)
        return "/" in one.key, order.index(base) if base in order else len(order)

    return [_named(one, names) for one in sorted(sort_metrics(keys), key=rank)]


def _named(one: Metric, names: Mapping[str, str]) -> Metric:
    """Return the metric with its name in these tables."""
    base = one.key.removeprefix(TWIN)
    if base in names:
        return replace(one, name=names[base] + (", clean twin" if base != one.key else ""), short="")
    if one.key.startswith("task/"):
        task, _, name = one.key.partition(".")
        short = {"ba": "BA", "expert_ba": "BA of benign expert"}.get(name, name)
        return replace(one, name=f"task {task.removeprefix('task/')}: {short}", short="", suffix="")
    return one


def metrics_table(record: Record, title: str) -> Table:
    """Build a table of the metrics of a mixture and of its clean twin, without those of single tasks."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("metric")
    metrics = record.metrics
    twin = {key.removeprefix(TWIN): value for key, value in metrics.items() if key.startswith(TWIN)}
    if "cad" in metrics:
        # Rounding must not lift the accuracy above 100%.
        twin["ba"] = {"value": min(100.0, metrics["ba"]["value"] + metrics["cad"]["value"])}
    for column in [
        "%",
        "95% interval",
        "texts" if record.is_text else "images",
        *(["clean twin"] if twin else []),
    ]:
        table.add_column(column, justify="right")
    shown = {key for key in metrics if "/" not in key and not key.startswith(TWIN)}
    for one in sort_mixture_metrics(shown, TEXT_NAMES if record.is_text else NAMES):
        found = metrics[one.key]
        mark = f" {MARK}" if one.key in MARKED and collapsed(record) else ""
        cells = [f"{found['value']:.2f}{mark}", _interval(found), str(found["n"])]
        if twin:
            cells.append(f"{twin[one.key]['value']:.2f}" if one.key in twin else NONE)
        table.add_row(one.label, *cells)
    note = TEXT_SHARES_NOTE if record.is_text else SHARES_NOTE
    lines = [note] if "harm_share" in metrics else []
    if (line := collapse_line(record)) is not None:
        lines.append(f"{MARK} {line}")
    table.caption = "\n".join(lines) or None
    return table


def task_table(record: Record, twin: Sequence[GateShares]) -> Table:
    """Build a table of the tasks of a mixture: BA, BA of the benign expert, and gate share of the expert."""
    table = Table(title="tasks", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    mixture = record.run_spec.mixture
    assert mixture is not None
    columns = ["BA %", "benign\nexpert %", "expert's\nshare %", *(["in the\ntwin %"] if twin else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for task in record.tasks:
        number = task["task"]
        own, expert = (record.metrics.get(f"task/{number}.{name}") for name in ("ba", "expert_ba"))
        shares = [_own_share(record.gate_shares, number), *([_own_share(twin, number)] if twin else [])]
        poisoned = ", poisoned" if number in mixture.poisoned_experts else ""
        table.add_row(escape(f"{number} {task['name']}{poisoned}"), _value(own), _value(expert), *shares)
    return table


def share_tables(
    shares: Sequence[GateShares],
    twin: Sequence[GateShares],
    poisoned: Sequence[int],
    names: Sequence[str],
    *,
    other: str = "twin",
    marked: str = "marked\nimages",
) -> list[Table]:
    """Build tables of gate shares, with one row for each layer.

    Args:
        shares: The gate shares of a mixture.
        twin: The gate shares of the clean twin, or of another mixture; empty if unknown.
        poisoned: The poisoned experts.
        names: Names of the tasks.
        other: Name of the other mixture.
        marked: Name of the marked images, or of the harmful queries.

    Returns:
        A table for each poisoned expert; for a benign mixture, one table of each expert's share for its own task.
    """
    if not shares:
        return []
    if not poisoned:
        return [_own_table(shares, names)]
    return [_poisoned_table(shares, twin, expert, names[expert], other, marked) for expert in poisoned]


def _own_table(shares: Sequence[GateShares], names: Sequence[str]) -> Table:
    rows = [(layer["layer"], [row[e] for e, row in enumerate(layer["tasks"])]) for layer in shares]
    title = "share of each expert for its own task, %"
    return _layers_table(title, [f"{e}\n{name}" for e, name in enumerate(names)], rows)


def _poisoned_table(
    shares: Sequence[GateShares],
    twin: Sequence[GateShares],
    expert: int,
    name: str,
    other: str,
    marked: str,
) -> Table:
    rows = [(layer["layer"], _kinds(layer, expert)) for layer in shares]
    columns = [marked, "its own\ntask", "other\ntasks"]
    if len(twin) == len(shares):
        rows = [
            (layer, [*values, *_kinds(second, expert)])
            for (layer, values), second in zip(rows, twin, strict=True)
        ]
        columns += [f"{other},\n{kind}" for kind in (marked.partition("\n")[0], "its own", "others")]
    return _layers_table(f"share of the poisoned expert {expert} ({name}) by layer, %", columns, rows)


def _kinds(layer: GateShares, expert: int) -> list[float | None]:
    """Return an expert's share for marked images, for its own task, and its mean over the other tasks."""
    marked = layer["marked"]
    others = [row[expert] for task, row in enumerate(layer["tasks"]) if task != expert]
    own = layer["tasks"][expert][expert]
    return [None if marked is None else marked[expert], own, sum(others) / len(others)]


def _layers_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]
) -> Table:
    """Build a table of shares with a row for each layer, and a row of means."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer")
    for column in columns:
        table.add_column(column, justify="right")
    for layer, values in rows:
        table.add_row(short_layer(layer), *map(_share, values))
    table.add_row("mean", *(_share(_mean(column)) for column in zip(*(v for _, v in rows), strict=True)))
    return table


def short_layer(name: str) -> str:
    """Return a layer's name in the dense model that a mixture was merged from."""
    from backdoorbench_moe.moe.merging import NETWORK

    return name.removeprefix(NETWORK)


def _own_share(shares: Sequence[GateShares], task: int) -> str:
    return _share(_mean([layer["tasks"][task][task] for layer in shares]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _value(found: Mapping[str, float] | None) -> str:
    if found is None:
        return NONE
    bounds = f" [{found['low']:.1f}, {found['high']:.1f}]" if "low" in found else ""
    return f"{found['value']:.2f}{bounds}"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['low']:.2f} – {found['high']:.2f}" if "low" in found else NONE
