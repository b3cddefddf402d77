"""Rendering of a suite's tables for the terminal (rich) and as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backdoorbench_moe.bench.suites.suite import Cell, value_of
from backdoorbench_moe.bench.tables.layout import (
    MetricTable,
    Place,
    Sheet,
    build_sheet,
    find_place,
    layouts_of,
    table_metrics,
)
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.wording import (
    MINUS,
    counts_line,
    facts,
    heading,
    inside_word,
    key_name,
    legend,
    own_text,
    paper_parts,
    place_lines,
    suite_line,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

GAP = 2


@dataclass(frozen=True)
class RichTables:
    """The tables of a suite for the terminal; a table that is too wide is split between columns."""

    sheet: Sheet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Render at the terminal's width."""
        from rich.text import Text

        sheet = self.sheet
        yield Text(sheet.suite.title, style="bold")
        yield Text(f"{suite_line(sheet.suite)}; {counts_line(sheet.counts)}")
        yield Text(f"{legend(sheet)}{_second_line(sheet)}", style="dim")
        for table in sheet.tables:
            yield Text(f"\n{heading(table)}", style="bold")
            for columns in _chunks(table, options.max_width):
                yield _rich_table(table, columns)
            if sheet.suite.note:
                yield Text(sheet.suite.note, style="dim")


def rich_tables(results: ResultSet, *, intervals: bool = False) -> RenderableType:
    """Build the tables of a suite for a rich Console; see `build_sheet`.

    Raises:
        ConfigError: A layout puts two cells in one place.
    """
    return RichTables(build_sheet(results, intervals=intervals))


def _second_line(sheet: Sheet) -> str:
    return " The second line of a cell is the paper's." if sheet.has_paper else ""


def _rich_lines(place: Place, *, interval: bool) -> list[str]:
    """Return `place_lines` in short form, as the row label already reads "paper"."""
    return [own_text(place, interval=interval), " ".join(paper_parts(place))]


def _chunks(table: MetricTable, width: int) -> Iterator[range]:
    """Yield ranges of at least one column that fit next to the row labels."""
    labels = [key_name(key) for key in table.row_keys]
    used = start = 0
    room = width - sum(
        max(map(len, [name, *(row[n] for row in table.rows)])) + GAP for n, name in enumerate(labels)
    )
    for number_, name in enumerate(table.columns):
        places = [row[number_] for row in table.places]
        texts = [name, *(text for each in places for text in _rich_lines(each, interval=table.intervals))]
        needed = max(map(len, texts)) + (GAP if number_ > start else 0)
        if used + needed > room and number_ > start:
            yield range(start, number_)
            start, used = number_, 0
        used += needed
    yield range(start, len(table.columns))


def _rich_table(table: MetricTable, columns: range) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for key in table.row_keys:
        drawn.add_column(Text(key_name(key)), overflow="fold")
    for number_ in columns:
        drawn.add_column(Text(table.columns[number_]), justify="right", overflow="fold")
    for group in table.groups():
        for labels, places in group:
            shown = [[text] for text in labels]
            if table.has_paper:
                shown[-1].append("  paper")
            texts = [Text("\n".join(lines)) for lines in shown]
            texts += [_styled(places[number_], table) for number_ in columns]
            drawn.add_row(*texts)
        drawn.add_section()
    return drawn


def _styled(place: Place, table: MetricTable) -> Any:
    from rich.text import Text

    ours, theirs = _rich_lines(place, interval=table.intervals)
    text = Text(ours, style="" if place.statistic else "dim" if place.shape is not None else "yellow")
    return text.append(f"\n{theirs}", style="dim") if table.has_paper else text


def markdown(sheet: Sheet) -> str:
    """Return the tables as Markdown. The second line of a cell is the published value."""
    lines = [f"# {plain(sheet.suite.title)}", "", legend(sheet), ""]
    for table in sheet.tables:
        lines += [f"## {plain(heading(table))}", "", *table_lines(table), "", f"{plain(facts(sheet))}.", ""]
    return "\n".join(lines)


def table_lines(table: MetricTable) -> list[str]:
    """Return one table as lines of Markdown."""
    names = [*(key_name(key) for key in table.row_keys), *table.columns]
    lines = [markdown_row(names), markdown_row(["---"] * len(table.row_keys) + ["--:"] * len(table.columns))]
    for labels, places in zip(table.rows, table.places, strict=True):
        cells = ["<br>".join(map(plain, place_lines(each, interval=table.intervals))) for each in places]
        lines.append(f"| {' | '.join([*map(plain, labels), *cells])} |")
    return lines


def markdown_row(texts: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(map(plain, texts))} |"


def plain(text: str) -> str:
    """Escape text for Markdown, in one line."""
    for character in "\\|*`":
        text = text.replace(character, f"\\{character}")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split())


CSV_KEYS = ("dataset", "model", "trigger", "applicator", "defenses", "poison.rate")
CSV_COLUMNS = (
    "state",
    "mean",
    "std",
    "n",
    "low",
    "high",
    "paper",
    "difference",
    "inside",
    "seeds",
    "near_chance",
)


def statistics_csv(results: ResultSet) -> str:
    """Return tidy statistics as CSV: one row per cell and metric, numbers to six decimals.

    Rates are in percent. `low` and `high` are the 95% interval of the mean over seeds, empty for fewer than three
    seeds. `inside` states whether the published value lies in it: "inside", "outside", "unknown" (no interval), or
    empty without a published value. `seeds` are separated by spaces. `near_chance` is the number of seeds whose model
    is near chance.
    """
    suite = results.suite
    metrics = list(
        dict.fromkeys(key for layout in layouts_of(suite) for key in table_metrics(results, layout))
    )
    parts = {key.partition(".")[0] for key in CSV_KEYS}
    axes = list(dict.fromkeys(key for cell in suite.cells for key in cell.values))
    extra = [key for key in axes if key not in CSV_KEYS and key.partition(".")[0] not in parts - {"poison"}]
    names = [percent_key(key) for key in (*CSV_KEYS, *extra)]
    rows = [["suite", "version", "scale", *names, "metric", *CSV_COLUMNS]]
    for cell in suite.cells:
        keys = [
            suite.name,
            suite.version,
            suite.scale or "",
            *(_plain_value(cell, k) for k in (*CSV_KEYS, *extra)),
        ]
        for metric in metrics:
            rows.append([*keys, metric, *_csv_values(find_place(results, cell, metric))])
    return write_csv(rows)


def _plain_value(cell: Cell, key: str) -> Any:
    value = value_of(cell.spec, key)
    return percent(value) if key == "poison.rate" else "" if value is None else value


def percent(rate: float) -> float:
    """Convert a share to percent without rounding errors: 0.0007 gives 0.07."""
    return float(f"{100 * rate:.12g}")


def percent_key(key: str) -> str:
    """Return the column name of a key; rates are in percent."""
    return "poison_rate_percent" if key == "poison.rate" else key


def _csv_values(place: Place) -> list[Any]:
    found = place.statistic
    if found is None:
        paper = "" if place.paper is None else place.paper
        return [place.state, "", "", 0, "", "", paper, "", "", "", 0]
    values = [found.mean, found.std, found.n, found.low, found.high, found.paper, found.difference]
    shown = [plain_number(value) for value in values]
    inside = inside_word(found) or ("" if found.paper is None else "unknown")
    return [place.state, *shown, inside, " ".join(map(str, found.seeds)), found.near_chance]


def plain_number(value: Any) -> Any:
    """Round a number to six decimals, without a negative zero; None gives "", other values are returned unchanged."""
    return "" if value is None else round(value, 6) + 0.0 if isinstance(value, float) else value


def write_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as CSV with lines that end in a newline only."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def latex(sheet: Sheet) -> str:
    """Return the tables as LaTeX, one `table` environment each; they only need the package booktabs."""
    head = "% \\usepackage{booktabs} in the preamble.\n"
    return head + "\n".join(_latex_table(sheet, table) for table in sheet.tables)


def _latex_table(sheet: Sheet, table: MetricTable) -> str:
    said = f"{heading(table)}. {facts(sheet)}. {legend(table)}"
    names = [*(key_name(key) for key in table.row_keys), *table.columns]
    lines = [
        r"\begin{table}",
        r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"  \caption{{{tex(said)}}}",
        rf"  \begin{{tabular}}{{@{{}}{'l' * len(table.row_keys)}{'r' * len(table.columns)}@{{}}}}",
        r"    \toprule",
        f"    {' & '.join(map(tex, names))} \\\\",
    ]
    for group in table.groups():
        lines.append(r"    \midrule")
        for labels, places in group:
            ours = [own_text(place, interval=table.intervals) for place in places]
            lines.append(f"    {' & '.join(map(tex, [*labels, *ours]))} \\\\")
            if table.has_paper:
                theirs = [", ".join(paper_parts(item)) for item in places]
                texts = [*[""] * (len(labels) - 1), r"\quad paper", *map(tex, theirs)]
                lines.append(f"    {' & '.join(texts)} \\\\ \\addlinespace")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    # At the beginning of a row, LaTeX would read these as arguments of the preceding line break.
    "[": "{[}", "]": "{]}", "*": "{*}",
    "±": r"$\pm$", "†": r"$\dagger$", MINUS: "$-$", "–": "--", "×": r"$\times$", "…": r"\dots{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Escape text for LaTeX, in one line."""
    return " ".join("".join(TEX.get(character, character) for character in text).split())
