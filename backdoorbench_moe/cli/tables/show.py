"""Tables of several runs that fit into the terminal without breaking words."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from backdoorbench_moe.cli.tables.show_columns import NONE, Column, ShownRun, choose_columns
from backdoorbench_moe.collapse import MARK, MARK_LEGEND
from backdoorbench_moe.errors import ConfigError

GAP = 2
# With fewer runs, a column with equal values stays in the table.
FEWEST_TO_LIFT = 2
# Columns whose value is printed once, above the table, if all runs share it. Metrics always stay in the table.
LIFTED = ("status", "data", "model", "trigger", "applicator", "poison", "defense", "seed", "epochs")


def sort_runs(runs: Sequence[ShownRun], keys: Sequence[str]) -> list[ShownRun]:
    """Sort runs by columns; runs without a value come last.

    Args:
        runs: The runs.
        keys: Keys of columns (see `choose_columns`), the most important first; "-" before a key sorts from high to low.

    Raises:
        UnknownNameError: There is no such column.
    """
    ordered = list(runs)
    for key in reversed(keys):
        [column] = choose_columns([key.removeprefix("-")], runs, intervals=False)
        having = [run for run in ordered if column.value(run) is not None]
        having.sort(key=lambda run: _order(column.value(run)), reverse=key.startswith("-"))
        ordered = having + [run for run in ordered if column.value(run) is None]
    return ordered


def _order(value: Any) -> tuple[int, float, str]:
    return (0, value, "") if isinstance(value, int | float) else (1, 0.0, str(value))


def split_keys(text: str | None, parameter: str) -> list[str] | None:
    """Split a comma-separated list of keys. Raises ConfigError if a key is empty."""
    if text is None:
        return None
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise ConfigError.expected(parameter, "names of columns such as seed,asr", text)
    return keys


def lift_columns(columns: Sequence[Column], runs: Sequence[ShownRun]) -> tuple[str, list[Column]]:
    """Remove the columns in which all runs are equal from a table.

    Returns:
        A line with the values that all runs share ("" if there are none), and the remaining columns. For a single run,
        all columns remain.
    """
    if len(runs) < FEWEST_TO_LIFT:
        return "", list(columns)
    equal = [c for c in columns if c.key in LIFTED and len({c.text(run) for run in runs}) == 1]
    said = [f"{column.title} {column.text(runs[0])}" for column in equal if column.text(runs[0]) != NONE]
    kept = [column for column in columns if column not in equal]
    return (f"all {len(runs)} runs: {', '.join(said)}" if said else ""), kept


def build_tables(columns: Sequence[Column], runs: Sequence[ShownRun], width: int) -> list[Table]:
    """Build a table of runs, or several tables below each other if the columns do not fit in one line.

    Args:
        columns: The columns.
        runs: The runs, one for each row. If there are several tables, each row begins with its number.
        width: Number of characters in a line.
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
    """Return the line width in characters if each column is as wide as its longest word."""
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
    """Return the runs as a Markdown table, one per row, with the legend of the mark of models near chance."""
    rows = [[column.title for column in columns], ["---"] * len(columns)]
    rows += [[column.text(run).replace("|", "\\|") for column in columns] for run in runs]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", legend] if (legend := mark_legend(columns, runs)) else [])])


def mark_legend(columns: Sequence[Column], runs: Sequence[ShownRun]) -> str | None:
    """Return the explanation of the mark of models near chance; None if no value is marked."""
    marked = any(column.text(run).endswith(MARK) for column in columns for run in runs)
    return MARK_LEGEND if marked else None
