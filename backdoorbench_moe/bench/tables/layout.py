"""A suite's layouts filled with its records: labels and places, independent of the output format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from backdoorbench_moe.bench.suites.suite import (
    METRIC_COLUMNS,
    Cell,
    Layout,
    Suite,
    order,
    part_label,
    part_of,
    value_of,
)
from backdoorbench_moe.bench.tables.record_metrics import uses_twin
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.tuning import plain_tuning, uses_tuning
from backdoorbench_moe.collapse import FILTERED
from backdoorbench_moe.config.poison import RATES
from backdoorbench_moe.config.shorthand import PARTS
from backdoorbench_moe.engine.graph import reference
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import metric as find_metric

# Texts of places without numbers, in addition to the states of records.
NO_CELL, NO_TWIN, NOT_MEASURED = "–", "no clean twin", "not measured"
NO_TUNING = "no plain tuning"
DEFAULT_METRICS = ("asr", "ba", "cad")


@dataclass(frozen=True)
class Place:
    """One place of a table.

    Args:
        state: "finished", or why there are no numbers.
        cell: The cell of the suite; None if the suite has no run for this place.
        statistic: The statistics of the metric; None if there are no numbers.
        paper: The published value, even if nothing was run.
        shape: The value published for another kind of model, in a column of such values.
    """

    state: str
    cell: Cell | None = None
    statistic: Statistic | None = None
    paper: float | None = None
    shape: float | None = None


@dataclass(frozen=True)
class MetricTable:
    """One table: rows x columns of places.

    Args:
        title: Title of the layout.
        metric: Key of its metric; None if the columns are metrics.
        row_keys: Keys of the row labels.
        column_key: Key of the columns.
        rows: For each row, one label for each of `row_keys`.
        columns: Labels of the columns.
        places: The places, row by row.
        metrics: Keys of all metrics in the table.
        models: The models whose published values have separate columns (see `PaperTable.is_shape`).
        intervals: Whether means are shown with their 95% intervals instead of standard deviations.
    """

    title: str
    metric: str | None
    row_keys: tuple[str, ...]
    column_key: str
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]
    metrics: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    intervals: bool = False

    @cached_property
    def has_paper(self) -> bool:
        """Whether any place has a published value."""
        return any(place.paper is not None for row in self.places for place in row)

    @cached_property
    def has_collapsed(self) -> bool:
        """Whether any place has a seed whose model is near chance."""
        found = [place.statistic for row in self.places for place in row]
        return any(statistic is not None and statistic.near_chance for statistic in found)

    def groups(self) -> Iterator[list[tuple[tuple[str, ...], tuple[Place, ...]]]]:
        """Yield groups of rows with the same first label; labels equal to those of the row above are ""."""
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
class RunCounts:
    """Numbers of runs of a suite.

    Args:
        wanted: Number of runs of all cells and seeds.
        finished: Number of finished runs among them.
        failed: Number of failed runs, including the other runs.
        others: Name of the other runs, which the suite's runs are compared with or depend on.
        others_wanted: Number of other runs.
        others_finished: Number of finished runs among them.
        precisions: Number of finished runs, including the other runs, by precision.
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
    """All tables of a suite, and the numbers of its runs; `intervals` as in `MetricTable`."""

    suite: Suite
    counts: RunCounts
    tables: tuple[MetricTable, ...]
    intervals: bool = False

    @cached_property
    def has_paper(self) -> bool:
        """Whether any table has a published value."""
        return any(table.has_paper for table in self.tables)

    @cached_property
    def has_collapsed(self) -> bool:
        """Whether any table has a seed whose model is near chance."""
        return any(table.has_collapsed for table in self.tables)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of the metrics of all tables."""
        return tuple(dict.fromkeys(key for table in self.tables for key in table.metrics))

    @property
    def models(self) -> tuple[str, ...]:
        """Models whose published values have separate columns."""
        return tuple(dict.fromkeys(model for table in self.tables for model in table.models))


def build_sheet(results: ResultSet, *, intervals: bool = False) -> Sheet:
    """Fill every layout of a suite.

    Args:
        results: The results of the suite.
        intervals: Whether means are shown with their 95% intervals instead of standard deviations.

    Raises:
        ConfigError: A layout puts two cells in one place.
    """
    tables = [table for layout in layouts_of(results.suite) for table in _fill(results, layout)]
    shown = tuple(replace(table, intervals=intervals) for table in tables)
    return Sheet(results.suite, count_runs(results), shown, intervals)


def layouts_of(suite: Suite) -> tuple[Layout, ...]:
    """Return the layouts of a suite, or the default layout if it has none."""
    return suite.tables or (default_layout(suite),)


def default_layout(suite: Suite) -> Layout:
    """Return the default layout of a suite: the last key of its grid as columns, the others as rows."""
    *rows, column = varied_keys(suite)
    return Layout(suite.title, tuple(rows) or ("model.name",), column, DEFAULT_METRICS)


def varied_keys(suite: Suite) -> list[str]:
    """List the keys of a suite's grid with several values; all of its keys if none has several."""
    keys = list(dict.fromkeys(key for cell in suite.cells for key in cell.values))
    varied = [key for key in keys if len({label(key, value_of(c.spec, key)) for c in suite.cells}) > 1]
    return varied or keys


def table_metrics(results: ResultSet, layout: Layout) -> tuple[str, ...]:
    """Return the metrics of a layout, each ASR followed by the target rate without the trigger.

    The rate is left out if the layout excludes it, or no run measured it.
    """
    metrics: list[str] = []
    for key in layout.metrics:
        metrics.append(key)
        beside = f"{key.removesuffix('asr')}target_rate"
        is_asr = layout.no_trigger and find_metric(key).base == "asr"
        if is_asr and beside not in layout.metrics and results.measured(beside):
            metrics.append(beside)
    return tuple(metrics)


def count_runs(results: ResultSet) -> RunCounts:
    """Count the suite's runs and, separately, the clean twins and other runs they depend on."""
    specs = results.suite.runs()
    runs = {spec.digest for spec in specs}
    others = {spec.digest for spec in order(results.suite)} - runs
    twins = {twin.digest for spec in specs if (twin := reference(spec)) is not None}
    status = {digest: record.status for digest, record in results.records.items()}
    return RunCounts(
        wanted=len(runs),
        finished=sum(status.get(digest) == "finished" for digest in runs),
        failed=sum(status.get(digest) == "failed" for digest in {*runs, *others}),
        others=_others(bool(others & twins) or not others, bool(others - twins)),
        others_wanted=len(others),
        others_finished=sum(status.get(digest) == "finished" for digest in others),
        precisions=Counter(record.environment["precision"] for record in results.finished()),
    )


def _others(twins: bool, inputs: bool) -> str:
    """Return the name of the other runs."""
    names = (["clean twins"] if twins else []) + (["runs they build on"] if inputs else [])
    return " and ".join(names)


def find_place(results: ResultSet, cell: Cell | None, metric: str) -> Place:
    """Find the state and the values of a metric in a cell."""
    if cell is None:
        return Place(NO_CELL)
    paper = results.paper.value(cell.spec, metric)
    statistic = results.statistic(cell, metric)
    if statistic is not None:
        return Place("finished", cell, statistic, paper)
    state = results.state(cell)
    if state == "finished":
        state = _why_not(results, cell, metric)
    return Place(state, cell, None, paper)


def _why_not(results: ResultSet, cell: Cell, metric: str) -> str:
    """Return why a finished run does not have a metric."""
    if uses_twin(metric) and not results.has_twin(cell):
        return NO_TWIN
    if not uses_tuning(metric):
        return NOT_MEASURED
    # Plain tuning would not help behind an input filter, which is never compared with it.
    compares = plain_tuning(cell.spec) is not None and not results.values(cell, FILTERED)
    return NO_TUNING if compares and not results.has_tuning(cell) else NO_CELL


def _find_shape(results: ResultSet, cell: Cell | None, metric: str, model: str) -> Place:
    """Return the value published for a cell on another kind of model."""
    shape = None if cell is None else results.paper.shape(cell.spec, metric, model)
    return Place(NO_CELL, cell, shape=shape)


def label(key: str, value: Any) -> str:
    """Format the value of a key as a label; rates in percent, and settings with several values as "rate=1%, ..."."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={label(f'{key}.{name}', each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "+".join(map(str, value)) or "none"
    if key.removeprefix("poison.") in RATES:
        return f"{100 * value:g}%"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell_labels(suite: Suite, key: str) -> list[str]:
    """Return the label of each cell of a suite for a key.

    The label of a part contains the options that the grid gives, and those that differ between cells with a part of
    this name. The others come from the recipe or the scale, which the table names once.
    """
    if key not in PARTS:
        return [label(key, value_of(cell.spec, key)) for cell in suite.cells]
    parts = [part_of(cell.spec, key) for cell in suite.cells]
    differing = _differing_options([part for part in parts if part is not None])
    texts = []
    for cell, part in zip(suite.cells, parts, strict=True):
        shown = part
        if part is not None:
            kept = {"name", *_given_options(cell, key), *differing[part["name"]]}
            shown = {name: value for name, value in part.items() if name in kept}
        texts.append(label(key, part_label(shown)))
    return texts


def _differing_options(parts: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Return the options that do not have the same value in all parts of a name, by this name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for part in parts:
        groups.setdefault(part["name"], []).append(part)
    found: dict[str, set[str]] = {}
    for name, group in groups.items():
        options = {key for part in group for key in part}
        # A missing option differs from every value.
        texts = {key: {repr(part[key]) if key in part else None for part in group} for key in options}
        found[name] = {key for key in options if len(texts[key]) > 1}
    return found


def _given_options(cell: Cell, key: str) -> set[str]:
    """Return the options of a part that the grid gives, in the part itself or by keys of their own."""
    given = cell.values.get(key)
    own = {name.removeprefix(f"{key}.") for name in cell.values if name.startswith(f"{key}.")}
    return own | (set(given) if isinstance(given, Mapping) else set())


# A column of a table: a label of the layout's columns, a metric and, for published values of another kind of model, the
# name of this model.
Column = tuple[str, str, str | None]


def _fill(results: ResultSet, layout: Layout) -> Iterator[MetricTable]:
    """Fill a layout: one table per metric, or a single table."""
    side_by_side = layout.columns == METRIC_COLUMNS
    metrics = table_metrics(results, layout)
    cells = _arrange(results.suite, layout, side_by_side)
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    columns = tuple(dict.fromkeys(column for _, column in cells))

    def with_shapes(column: str, key: str) -> list[Column]:
        own = [cell.spec for (_, each), cell in cells.items() if each == column]
        models = results.paper.models
        having = [m for m in models if any(results.paper.shape(spec, key, m) is not None for spec in own)]
        return [(column, key, None), *((column, key, model) for model in having)]

    def place(row: tuple[str, ...], column: Column) -> Place:
        cell, key, model = cells.get((row, column[0])), *column[1:]
        return find_place(results, cell, key) if model is None else _find_shape(results, cell, key, model)

    def table(metric: str | None, wanted: Sequence[Column]) -> MetricTable:
        names = tuple(_column_name(column, side_by_side) for column in wanted)
        return MetricTable(
            layout.title,
            metric,
            layout.rows,
            layout.columns,
            rows,
            names,
            tuple(tuple(place(row, column) for column in wanted) for row in rows),
            tuple(dict.fromkeys(key for _, key, _ in wanted)),
            tuple(dict.fromkeys(model for _, _, model in wanted if model is not None)),
        )

    if side_by_side:
        yield table(None, [each for key in metrics for each in with_shapes("", key)])
        return
    for key in metrics:
        yield table(key, [each for column in columns for each in with_shapes(column, key)])


def _column_name(column: Column, side_by_side: bool) -> str:
    label_, key, model = column
    name = find_metric(key).heading if side_by_side else label_
    return name if model is None else f"{name}, {model}"


def _arrange(suite: Suite, layout: Layout, side_by_side: bool) -> dict[tuple[tuple[str, ...], str], Cell]:
    """Return the cell at each pair of row labels and column label."""
    cells: dict[tuple[tuple[str, ...], str], Cell] = {}
    labels = [cell_labels(suite, key) for key in layout.rows]
    columns = [""] * len(suite.cells) if side_by_side else cell_labels(suite, layout.columns)
    for number, (cell, column) in enumerate(zip(suite.cells, columns, strict=True)):
        if not layout.shows(cell.spec):
            continue
        row = tuple(each[number] for each in labels)
        if (other := cells.setdefault((row, column), cell)) is not cell:
            raise ConfigError(
                f"suite {suite.name}: table {layout.title!r}: {dict(cell.values)} and "
                f"{dict(other.values)} are in the same place; expected a key in rows that tells them apart"
            )
    return cells
