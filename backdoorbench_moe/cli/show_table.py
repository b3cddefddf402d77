"""Several runs as a table that fits the terminal without breaking a word."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from backdoorbench_moe.cli.show_columns import NONE, Column, ShownRun, choose_columns
from backdoorbench_moe.collapse import MARK, MARK_LEGEND, collapsed
from backdoorbench_moe.errors import ConfigError

GAP = 2
# Below this many runs, a column in which all are equal is still a column.
FEWEST_TO_LIFT = 2
# Which columns may be printed once for all runs: the others are what a table of runs is for.
LIFTED = ("status", "data", "model", "trigger", "applicator", "poison", "defense", "seed", "epochs")


def sort_runs(runs: Sequence[ShownRun], keys: Sequence[str]) -> list[ShownRun]:
    """Runs sorted by columns, the first key first; a key with "-" before it sorts from high to low.

    Runs without a value come last. Raises UnknownNameError for a key that is no column.
    """
    ordered = list(runs)
    for key in reversed(keys):
        [column] = choose_columns([key.removeprefix("-")], runs, intervals=False)
        there = [run for run in ordered if column.value(run) is not None]
        there.sort(key=lambda run: _order(column.value(run)), reverse=key.startswith("-"))
        ordered = there + [run for run in ordered if column.value(run) is None]
    return ordered


def _order(value: Any) -> tuple[int, float, str]:
    return (0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value))


def split_keys(text: str | None, parameter: str) -> list[str] | None:
    """The keys in a comma-separated list. Raises ConfigError for an empty one among them."""
    if text is None:
        return None
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise ConfigError.expected(parameter, "names of columns such as seed,asr", text)
    return keys


def lift_columns(columns: Sequence[Column], runs: Sequence[ShownRun]) -> tuple[str, list[Column]]:
    """A line with what is equal in all runs, and the columns that are left. Both as they were for one run."""
    if len(runs) < FEWEST_TO_LIFT:
        return "", list(columns)
    equal = [c for c in columns if c.key in LIFTED and len({c.text(run) for run in runs}) == 1]
    said = [f"{column.title} {column.text(runs[0])}" for column in equal if column.text(runs[0]) != NONE]
    kept = [column for column in columns if column not in equal]
    return (f"all {len(runs)} runs: {', '.join(said)}" if said else ""), kept


def build_tables(columns: Sequence[Column], runs: Sequence[ShownRun], width: int) -> list[Table]:
    """The runs as one table; as several below each other where a line has not enough room for all columns.

    Args:
        columns: What to print.
        runs: One a row. In several tables each row begins with its number.
        width: Characters in a line.
    """
    cells = [[column.title, *(column.text(run) for run in runs)] for column in columns]
    if _needed(cells) <= width:
        return [_table(cells, width)]
    numbers = ["#", *(str(number) for number in range(1, len(runs) + 1))]
    bands: list[list[list[str]]] = [[numbers]]
    for column in cells:
        if len(bands[-1]) > 1 and _needed([*bands[-1], column]) > width:
            bands.append([numbers])
        bands[-1].append(column)
    return [_table(band, width) for band in bands]


def _needed(cells: Sequence[Sequence[str]]) -> int:
    """The characters in a line that columns need at least, each as wide as its longest word."""
    return sum(map(_longest_word, cells)) + GAP * (len(cells) - 1)


def _longest_word(column: Sequence[str]) -> int:
    return max(len(word) for text in column for word in text.split() or [""])


def _table(cells: Sequence[Sequence[str]], width: int) -> Table:
    widths = [max(map(len, column)) for column in cells]
    least = [_longest_word(column) for column in cells]
    while sum(widths) + GAP * (len(cells) - 1) > width:
        spare = max(range(len(cells)), key=lambda place: (widths[place] > least[place], widths[place]))
        if widths[spare] <= least[spare]:
            break  # A single word is wider than the terminal.
        widths[spare] -= 1
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column, size in zip(cells, widths, strict=True):
        numbers = all(_is_number(text) for text in column[1:])
        table.add_column(_wrap(column[0], size), no_wrap=True, justify="right" if numbers else "left")
    for row in range(1, len(cells[0])):
        table.add_row(*(_wrap(column[row], size) for column, size in zip(cells, widths, strict=True)))
    return table


def _is_number(text: str) -> bool:
    return (
        text == NONE
        or text.removesuffix(f" {MARK}").removesuffix("%").lstrip("-").replace(".", "", 1).isdigit()
    )


def _wrap(text: str, size: int) -> str:
    from rich.markup import escape

    lines = textwrap.wrap(text, max(1, size), break_long_words=False, break_on_hyphens=False)
    return escape("\n".join(lines))


def markdown_table(columns: Sequence[Column], runs: Sequence[ShownRun]) -> str:
    """The runs as a Markdown table, one a row, with a line below if a model is near chance."""
    rows = [[column.title for column in columns], ["---"] * len(columns)]
    rows += [[column.text(run).replace("|", "\\|") for column in columns] for run in runs]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", legend] if (legend := mark_legend(runs)) else [])])


def mark_legend(runs: Sequence[ShownRun]) -> str | None:
    """What the mark of a model near chance means; None if no run has one."""
    return MARK_LEGEND if any(collapsed(run.record) for run in runs) else None
