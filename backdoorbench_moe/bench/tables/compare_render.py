"""Rendering of a comparison for the terminal (rich) and as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.bench.tables.compare import CellPair, SuiteComparison, Value
from backdoorbench_moe.bench.tables.render import markdown_row, percent_key, plain, plain_number, write_csv
from backdoorbench_moe.bench.tables.wording import COLLAPSED, key_name, mean_text, number, signed
from backdoorbench_moe.metrics import metric as find_metric
from backdoorbench_moe.wording.counting import count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LEGEND = (
    "Each cell: mean ± standard deviation over n seeds. Difference: B minus A in percentage points, and its 95% "
    "interval, if each side has at least 3 seeds: from the differences of the seeds if both are of the same trained "
    "models, otherwise from the intervals of both means."
)


def rich_comparison(comparison: SuiteComparison) -> RenderableType:
    """Build one table per metric, for terminals with at least 80 columns."""
    from rich.console import Group
    from rich.text import Text

    items: list[RenderableType] = [Text(line) for line in _head(comparison)]
    items.append(Text(_legend(comparison), style="dim"))
    for metric in comparison.metrics:
        items.append(Text(f"\n{find_metric(metric).title}", style="bold"))
        items.append(_rich_table(comparison, metric))
    return Group(*items)


def _legend(comparison: SuiteComparison) -> str:
    found = [
        side[metric].statistic
        for row in comparison.rows
        for side in (row.a, row.b)
        for metric in comparison.metrics
        if side is not None
    ]
    return LEGEND + (f" {COLLAPSED}." if any(one is not None and one.near_chance for one in found) else "")


def _head(comparison: SuiteComparison) -> list[str]:
    both, only_a, only_b = comparison.counts
    lines = [f"A: {comparison.a.label}", f"B: {comparison.b.label}"]
    notes = [side.results.suite.note for side in (comparison.a, comparison.b)]
    if notes[0] == notes[1]:
        lines += [f"both: {note}" for note in notes[:1] if note]
    else:
        lines += [f"{name}: {note}" for name, note in zip("AB", notes, strict=True) if note]
    lines += [f"{key}: {a} in A, {b} in B" for key, a, b in comparison.differs]
    lines.append(f"{count(both, 'cell')} in both, {only_a} only in A, {only_b} only in B")
    return lines


def _texts(row: CellPair, metric: str) -> list[str]:
    """Return the texts of A, B, the difference and its interval."""
    difference, interval = row.difference(metric), row.interval(metric)
    # Equal runs can have different values of a metric that also depends on other runs, such as plain tuning.
    same = (
        row.same
        and row.a is not None
        and row.b is not None
        and _known(row.a, metric) == _known(row.b, metric)
    )
    return [
        _side(row.a, metric),
        _side(row.b, metric),
        "same runs" if same else "–" if difference is None else signed(difference),
        "–" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]",
    ]


def _known(values: Mapping[str, Value], metric: str) -> bool:
    return values[metric].statistic is not None


def _side(values: Any, metric: str) -> str:
    if values is None:
        return "–"
    value: Value = values[metric]
    return value.state if value.statistic is None else mean_text(value.statistic)


COLUMNS = ("A", "B", "B − A", "95% interval")


def _rich_table(comparison: SuiteComparison, metric: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key in comparison.keys:
        table.add_column(Text(key_name(key)), overflow="fold")
    for name in ("A\nB", "B − A\n95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for rows in _sections(comparison):
        for row in rows:
            a, b, difference, interval = _texts(row, metric)
            table.add_row(*map(Text, (*row.labels, f"{a}\n{b}", f"{difference}\n{interval}")))
        table.add_section()
    return table


def _sections(comparison: SuiteComparison) -> list[Sequence[CellPair]]:
    both, only_a, _ = comparison.counts
    rows = comparison.rows
    return [rows[:both], rows[both : both + only_a], rows[both + only_a :]]


def comparison_markdown(comparison: SuiteComparison) -> str:
    """Return one table per metric as Markdown."""
    lines = [f"# {plain(comparison.a.label)} and {plain(comparison.b.label)}", ""]
    lines += [f"- {plain(line)}" for line in _head(comparison)]
    lines += ["", _legend(comparison), ""]
    for metric in comparison.metrics:
        names = [*(key_name(key) for key in comparison.keys), *COLUMNS]
        lines += [f"## {find_metric(metric).title}", "", markdown_row(names)]
        lines.append(markdown_row(["---"] * len(comparison.keys) + ["--:"] * len(COLUMNS)))
        lines += [markdown_row([*row.labels, *_texts(row, metric)]) for row in comparison.rows]
        lines.append("")
    return "\n".join(lines)


def comparison_csv(comparison: SuiteComparison) -> str:
    """Return CSV with one row per cell and metric, numbers to six decimals.

    The column `cells` is "both", "only A" or "only B". `a_near_chance` and `b_near_chance` are the numbers of seeds
    whose model (or twin, if the metric depends on it) is near chance.
    """
    sides = [f"{side}_{name}" for side in "ab" for name in ("state", "mean", "std", "n", "near_chance")]
    keys = [percent_key(key) for key in comparison.keys]
    rows: list[list[Any]] = [["a", "b", "cells", *keys, "metric", *sides, "difference", "low", "high"]]
    for row in comparison.rows:
        cells = "only A" if row.b is None else "only B" if row.a is None else "both"
        labels = [text.removesuffix("%") if key == "poison.rate" else text
                  for key, text in zip(comparison.keys, row.labels, strict=True)]  # fmt: skip
        for metric in comparison.metrics:
            values: list[Any] = [*_numbers(row.a, metric), *_numbers(row.b, metric)]
            values += [row.difference(metric), *(row.interval(metric) or (None, None))]
            shown = map(plain_number, values)
            rows.append([comparison.a.label, comparison.b.label, cells, *labels, metric, *shown])
    return write_csv(rows)


def _numbers(values: Any, metric: str) -> list[Any]:
    if values is None:
        return [None] * 5
    value: Value = values[metric]
    found = value.statistic
    if found is None:
        return [value.state, None, None, 0, 0]
    return [value.state, found.mean, found.std, found.n, found.near_chance]
