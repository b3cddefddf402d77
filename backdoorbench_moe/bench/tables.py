"""A suite's layouts filled from its records: labels and places, the same for every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.bench.results import ResultSet, Statistic
from backdoorbench_moe.bench.suite import METRIC_COLUMNS, Cell, Layout, Suite, order, value_of
from backdoorbench_moe.errors import ConfigError

# What a place without numbers says, beside the states of a record.
NO_CELL, NO_TWIN, NOT_MEASURED = "–", "no clean twin", "not measured"


@dataclass(frozen=True)
class Place:
    """One place of a table: the statistic of a metric, or in a word why there is none.

    cell: None where the suite has no run for this place. paper: the published value, also where nothing
    was run.
    """

    state: str
    cell: Cell | None = None
    statistic: Statistic | None = None
    paper: float | None = None


@dataclass(frozen=True)
class MetricTable:
    """One metric of one layout: rows x columns of places. rows: for each row a label for each of `row_keys`.

    metric: None where the columns are metrics.
    """

    title: str
    metric: str | None
    row_keys: tuple[str, ...]
    column_key: str
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]

    @property
    def has_paper(self) -> bool:
        """Whether there is a published value for any place."""
        return any(place.paper is not None for row in self.places for place in row)

    def groups(self) -> Iterator[list[tuple[tuple[str, ...], tuple[Place, ...]]]]:
        """Rows with the same first label together; labels that would only repeat those above are ""."""
        group: list[tuple[tuple[str, ...], tuple[Place, ...]]] = []
        above: tuple[str, ...] = ()
        for labels, places in zip(self.rows, self.places, strict=True):
            if group and len(self.row_keys) > 1 and labels[0] != above[0]:
                yield group
                group, above = [], ()
            last = len(labels) - 1
            shown = (
                "" if n < last and labels[: n + 1] == above[: n + 1] else text
                for n, text in enumerate(labels)
            )
            group.append((tuple(shown), places))
            above = labels
        yield group


@dataclass(frozen=True)
class Counts:
    """How far a suite is: its runs by status, and the `others` these are measured against or made from.

    precisions: how many finished ones, the others among them, were computed in which precision.
    """

    wanted: int
    finished: int
    failed: int
    others: str
    others_wanted: int
    others_finished: int
    precisions: Mapping[str, int]


@dataclass(frozen=True)
class Sheet:
    """All tables of a suite, and how much of it was run."""

    suite: Suite
    counts: Counts
    tables: tuple[MetricTable, ...]


def build_sheet(results: ResultSet) -> Sheet:
    """Fill every layout of a suite, one table a metric.

    Raises ConfigError where a layout would put two cells in one place.
    """
    layouts = results.suite.tables or (default_layout(results.suite),)
    tables = tuple(table for layout in layouts for table in _fill(results, layout))
    return Sheet(results.suite, count_runs(results), tables)


def default_layout(suite: Suite) -> Layout:
    """A layout for a suite that gives none: a row for each value of its grid's keys, the last key across."""
    keys = list(dict.fromkeys(key for cell in suite.cells for key in cell.values))
    varied = [key for key in keys if len({label(key, value_of(c.spec, key)) for c in suite.cells}) > 1]
    *rows, column = varied or keys
    return Layout(suite.title, tuple(rows) or ("model.name",), column, ("asr", "ba", "cad"))


def count_runs(results: ResultSet) -> Counts:
    """Count the suite's runs, and apart from them the clean twins and whatever else they are made from."""
    runs = {spec.digest for spec in results.suite.runs()}
    others = {spec.digest: spec for spec in order(results.suite) if spec.digest not in runs}
    status = {digest: record.status for digest, record in results.records.items()}
    return Counts(
        wanted=len(runs),
        finished=sum(status.get(digest) == "finished" for digest in runs),
        failed=sum(status.get(digest) == "failed" for digest in {*runs, *others}),
        others="clean twins" if all(not spec.attacked for spec in others.values()) else "runs they build on",
        others_wanted=len(others),
        others_finished=sum(status.get(digest) == "finished" for digest in others),
        precisions=Counter(record.environment["precision"] for record in results.finished()),
    )


def find_place(results: ResultSet, cell: Cell | None, metric: str) -> Place:
    """What is known of a metric of a cell."""
    if cell is None:
        return Place(NO_CELL)
    paper = results.paper.value(cell.spec, metric)
    statistic = results.statistic(cell, metric)
    if statistic is not None:
        return Place("finished", cell, statistic, paper)
    state = results.state(cell)
    if state == "finished":
        state = NO_TWIN if metric == "cad" else NOT_MEASURED
    return Place(state, cell, None, paper)


def label(key: str, value: Any) -> str:
    """A value as a label; rates as percent."""
    if value is None:
        return "none"
    if key == "poison.rate":
        return f"{100 * value:g}%"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_label(metric: str) -> str:
    """ "pruned.asr" -> "pruned ASR"."""
    stage, _, name = metric.rpartition(".")
    name = name if name == "seconds" else name.upper()
    return f"{stage} {name}" if stage else name


def _fill(results: ResultSet, layout: Layout) -> Iterator[MetricTable]:
    """The layout's tables: one a metric, or one in all."""
    side_by_side = layout.columns == METRIC_COLUMNS
    there: dict[tuple[tuple[str, ...], str], Cell] = {}
    for cell in results.suite.cells:
        row = tuple(label(key, value_of(cell.spec, key)) for key in layout.rows)
        column = "" if side_by_side else label(layout.columns, value_of(cell.spec, layout.columns))
        if (twin := there.setdefault((row, column), cell)) is not cell:
            raise ConfigError(
                f"suite {results.suite.name}: table {layout.title!r}: {dict(cell.values)} and "
                f"{dict(twin.values)} would stand in one place; expected a key in rows that tells them apart"
            )
    rows = tuple(dict.fromkeys(row for row, _ in there))
    columns = tuple(dict.fromkeys(column for _, column in there))

    def table(metric: str | None, names: tuple[str, ...], wanted: Sequence[tuple[str, str]]) -> MetricTable:
        places = tuple(
            tuple(find_place(results, there.get((row, column)), each) for column, each in wanted)
            for row in rows
        )
        return MetricTable(layout.title, metric, layout.rows, layout.columns, rows, names, places)

    if side_by_side:
        yield table(None, tuple(map(metric_label, layout.metrics)), [("", m) for m in layout.metrics])
        return
    for metric in layout.metrics:
        yield table(metric, columns, [(column, metric) for column in columns])
