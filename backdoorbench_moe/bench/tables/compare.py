"""Comparison of two suites or results folders: the cells they share, and the differences between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.suites.paper import PaperTable
from backdoorbench_moe.bench.suites.reading import load_named
from backdoorbench_moe.bench.suites.suite import Cell, Layout, Suite, seedless_digest, value_of
from backdoorbench_moe.bench.tables.layout import DEFAULT_METRICS, find_place, label, table_metrics
from backdoorbench_moe.bench.tables.results import CLEAN_CELLS, MANIFEST, ResultSet, read_lines, read_manifest
from backdoorbench_moe.bench.tables.statistic import Statistic, compared_interval
from backdoorbench_moe.bench.tables.wording import suite_line
from backdoorbench_moe.config import PARTS, RunSpec
from backdoorbench_moe.engine.graph import base_of
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.paths import expand
from backdoorbench_moe.records import Record

# A cell spans all seeds, and the device and the name of the recipe do not identify a run.
NOT_COMPARED = ("seed", "device", "recipe")
FIRST_KEYS = (
    "dataset.name",
    "model.name",
    "trigger.name",
    "applicator.name",
    "attack.name",
    "gate.name",
    "defenses",
    "poison.rate",
)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its label and its results."""

    label: str
    results: ResultSet


@dataclass(frozen=True)
class Value:
    """One metric of a cell on one side. `state` is "finished", or the reason why there is no statistic."""

    state: str
    statistic: Statistic | None = None


@dataclass(frozen=True)
class CellPair:
    """A cell of one or both sides.

    Args:
        labels: The values of the comparison's keys.
        a: Values of A, by metric; None if A does not have the cell.
        b: Values of B, by metric; None if B does not have the cell.
        same: Whether both sides have the same runs, so that the difference is meaningless.
        paired: Whether both sides are of the same trained models, which differ in their defenses.
    """

    labels: tuple[str, ...]
    a: Mapping[str, Value] | None
    b: Mapping[str, Value] | None
    same: bool = False
    paired: bool = False

    def difference(self, metric: str) -> float | None:
        """Compute B's mean minus A's; None unless both have a mean, from different runs."""
        a, b = self._statistics(metric)
        return None if a is None or b is None or self.same else b.mean - a.mean

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Compute the 95% interval of the difference (see `statistic.compared_interval`).

        Returns:
            Low and high end; None if a side has fewer than three seeds and thus no interval.
        """
        a, b = self._statistics(metric)
        if a is None or b is None or self.same:
            return None
        return compared_interval(a, b, paired=self.paired)

    def _statistics(self, metric: str) -> tuple[Statistic | None, Statistic | None]:
        a, b = (side[metric].statistic if side else None for side in (self.a, self.b))
        return a, b


@dataclass(frozen=True)
class SuiteComparison:
    """Two result sets matched cell by cell.

    Args:
        a: The first side.
        b: The second side.
        metrics: Keys of the compared metrics.
        keys: Keys of the row labels.
        differs: Settings in which all cells of A differ from all cells of B; they are ignored in matching. Each is a
            key, A's values and B's values.
        rows: Common cells in A's order, then cells that only A has, then cells that only B has.
    """

    a: Side
    b: Side
    metrics: tuple[str, ...]
    keys: tuple[str, ...]
    differs: tuple[tuple[str, str, str], ...]
    rows: tuple[CellPair, ...]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return the number of common rows, of rows that only A has, and of rows that only B has."""
        both = sum(row.a is not None and row.b is not None for row in self.rows)
        only_a = sum(row.b is None for row in self.rows)
        return both, only_a, len(self.rows) - both - only_a


def open_side(text: str, output: Path | str, only: Sequence[str] = ()) -> Side:
    """Open one side of a comparison.

    Args:
        text: SUITE or SUITE:SCALE, or the path of a results folder of any version of its suite.
        output: Folder of run folders from which a suite is read.
        only: Filters of its cells; see `Suite.only`.

    Raises:
        UnknownNameError: The suite or scale does not exist, or a filter names an unknown value.
        ConfigError: The text is malformed, there is nothing at the path, the suite is invalid, or no cell is left.
        RecordError: The folder cannot be read.
    """
    folder = expand(text)
    if (folder / MANIFEST).is_file():
        results = read_folder(folder)
        return Side(
            _label(f"{suite_line(results.suite)} ({text})", only),
            replace(results, suite=results.suite.only(only)),
        )
    if folder.is_dir():
        raise RecordError(f"results folder {text}: expected a {MANIFEST} in it, found none")
    suite = load_named(text, what="suite or results folder").only(only)
    return Side(_label(suite_line(suite), only), ResultSet.from_runs(suite, output))


def _label(line: str, only: Sequence[str]) -> str:
    return ", ".join([line, *only])


def read_folder(folder: Path) -> ResultSet:
    """Read a results folder by its manifest, even if the suite has changed since.

    Published values are left out, as they belong to the suite's file.

    Raises:
        RecordError: The folder is damaged or contains no finished run.
    """
    manifest, records = read_manifest(folder), read_lines(folder)
    if not isinstance(clean := manifest.get(CLEAN_CELLS, []), list):
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: {CLEAN_CELLS}: expected a list")
    shown = _records_of_cells(records, clean)
    if not shown:
        raise RecordError(f"results folder {folder}: holds no finished run")
    seeds = [record.run_spec.seed for record in shown]
    cells = {
        seedless_digest(record.run_spec): Cell({}, replace(record.run_spec, seed=min(seeds)))
        for record in shown
    }
    try:
        suite = Suite(
            name=str(manifest["suite"]),
            title=str(manifest["title"]),
            version=int(manifest["version"]),
            scale=manifest["scale"],
            note=str(manifest["note"]),
            repeats=max(seeds) - min(seeds) + 1,
            cells=tuple(cells.values()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"results folder {folder}: {MANIFEST} is damaged: {error!r}") from error
    found: dict[str, Record] = {record.digest: record for record in records}
    return ResultSet(suite, found, PaperTable())


def compare(a: Side, b: Side, metrics: Sequence[str]) -> SuiteComparison:
    """Match the cells of two sides.

    Two cells match if their specs are equal except for the seed and for keys in which the sides differ as a whole. The
    sides differ in a key as a whole if they have no value of it in common and one of them has a single value; options
    of a part are compared separately for each part. Scales, data sets or models can therefore be compared, while a
    poisoning rate that only one side has is left unmatched.

    Raises:
        ConfigError: The sides have no cell in common.
    """
    flat_a, flat_b = ([_flatten(cell.spec) for cell in side.results.suite.cells] for side in (a, b))
    differing = _find_differing(flat_a, flat_b)
    partners: dict[str, list[int]] = {}
    for n, flat in enumerate(flat_b):
        partners.setdefault(_signature(flat, differing), []).append(n)
    pairs: list[tuple[int | None, int | None]] = []
    for n, flat in enumerate(flat_a):
        pairs += [(n, m) for m in partners.get(_signature(flat, differing), [])]
    for side, count in ((0, len(flat_a)), (1, len(flat_b))):
        matched = {pair[side] for pair in pairs}
        pairs += [(n, None) if side == 0 else (None, n) for n in range(count) if n not in matched]
    if not any(n is not None and m is not None for n, m in pairs):
        raise ConfigError(f"compare: {a.label} and {b.label} have no cell in common")
    shown = [
        _row_values(n if n is None else flat_a[n], m if m is None else flat_b[m], differing) for n, m in pairs
    ]
    keys = _distinguishing_keys(shown)
    rows = tuple(
        CellPair(
            tuple(label(key, values[key]) if key in values else "–" for key in keys),
            None if n is None else _values(a, a.results.suite.cells[n], metrics),
            None if m is None else _values(b, b.results.suite.cells[m], metrics),
            n is not None and m is not None and _results_of_runs(a, n) == _results_of_runs(b, m) != [],
            n is not None and m is not None and _same_models(a, n, b, m),
        )
        for (n, m), values in zip(pairs, shown, strict=True)
    )
    return SuiteComparison(a, b, tuple(metrics), keys, _describe(differing), rows)


def default_metrics(a: Side, b: Side) -> tuple[str, ...]:
    """Return the metrics of both suites' tables; for a results folder, those of the default layout."""
    sides = [side.results for side in (a, b) if side.results.suite.tables]
    layouts = [(results, layout) for results in sides for layout in results.suite.tables]
    # Results folders do not store layouts.
    layouts = layouts or [(side.results, Layout("", (), "", DEFAULT_METRICS)) for side in (a, b)]
    return tuple(dict.fromkeys(key for results, layout in layouts for key in table_metrics(results, layout)))


Flat = dict[str, Any]
# (key, name of the part or None for all) -> its values in A and in B.
Differing = dict[tuple[str, str | None], tuple[set[Any], set[Any]]]


def _records_of_cells(records: Sequence[Record], clean_cells: Collection[str]) -> list[Record]:
    """Select the records of cells, without the runs that cells depend on or are compared with.

    Args:
        records: The records of a results folder.
        clean_cells: Digests of the cells without an attack (see `seedless_digest`).

    Returns:
        The records of attacked cells and of these clean cells; all records if there are none.
    """
    whole = _without_parts(records)
    return [
        record
        for record in whole
        if record.run_spec.attacked or seedless_digest(record.run_spec) in clean_cells
    ] or whole


def _without_parts(records: Sequence[Record]) -> list[Record]:
    """Remove the records of bases and experts of mixtures, which only exist to be merged."""
    specs = [record.run_spec for record in records]
    bases = {base_of(spec).digest for spec in specs if spec.mixture is not None}
    return [
        record
        for record, spec in zip(records, specs, strict=True)
        if spec.digest not in bases and (spec.mixture is None or spec.mixture.task is None)
    ]


def _flatten(spec: RunSpec) -> Flat:
    """Return the values by which cells are matched, by dotted key."""
    spec = spec.without_folders()
    flat: Flat = {"defenses": value_of(spec, "defenses")}
    # Specs contain an attack without options as its bare name, and omit a surrogate without options.
    short = {"attack": spec.attack, "surrogate": spec.surrogate}
    parts = {key: None if part is None else part.to_dict() for key, part in short.items()}
    for key, value in {**spec.to_dict(), **parts}.items():
        if key in (*NOT_COMPARED, "defenses"):
            continue
        if key in PARTS and value is None:
            flat[f"{key}.name"] = None
        elif isinstance(value, dict):
            flat |= {f"{key}.{name}": _hashable(item) for name, item in value.items()}
        else:
            flat[key] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _find_differing(a: Sequence[Flat], b: Sequence[Flat]) -> Differing:
    found: Differing = {}
    keys = {key for flat in (*a, *b) for key in flat}
    # Names first: options of parts with different names are not compared.
    for key in sorted(keys, key=lambda key: (not key.endswith(".name"), key)):
        part = key.partition(".")[0]
        name = f"{part}.name"
        if part not in PARTS or key == name:
            groups: list[str | None] = [None]
        elif (name, None) in found:
            found[key, None] = _values_of(a, key), _values_of(b, key)
            continue
        else:
            groups = sorted(
                {flat[name] for flat in a if name in flat}
                & {flat[name] for flat in b if name in flat} - {None}
            )
        for group in groups:
            ours, theirs = (
                _values_of([f for f in flats if group in (None, f.get(name))], key) for flats in (a, b)
            )
            if not ours & theirs and min(len(ours), len(theirs)) == 1:
                found[key, group] = ours, theirs
    return found


def _values_of(flats: Sequence[Flat], key: str) -> set[Any]:
    return {flat.get(key) for flat in flats}


def _differing_values(flat: Flat, key: str, differing: Differing) -> tuple[set[Any], set[Any]] | None:
    """Return A's and B's values of a key in which they differ as a whole; None for other keys."""
    name = flat.get(f"{key.partition('.')[0]}.name")
    return differing.get((key, None)) or differing.get((key, name))


def _signature(flat: Flat, differing: Differing) -> str:
    kept = {key: value for key, value in flat.items() if _differing_values(flat, key, differing) is None}
    return json.dumps(kept, sort_keys=True)


def _row_values(a: Flat | None, b: Flat | None, differing: Differing) -> Flat:
    """Return the values that row labels may show: of matched keys, and of keys with several values."""
    shown: Flat = {}
    for flat, side in ((a, 0), (b, 1)):
        for key, value in (flat or {}).items():
            sets = _differing_values(flat or {}, key, differing)
            if sets is None or len(sets[side]) > 1:
                shown[key] = value
    return shown


def _distinguishing_keys(shown: Sequence[Flat]) -> tuple[str, ...]:
    """Choose as few keys as possible that tell the rows apart, the usual ones first."""
    # Prefer the name of a file to its hash.
    rest = sorted(
        {key for values in shown for key in values} - set(FIRST_KEYS),
        key=lambda key: (key.startswith("files."), key),
    )
    chosen: list[str] = []
    distinct = 1
    for key in (*FIRST_KEYS, *rest):
        labels = {tuple(str(values.get(name)) for name in (*chosen, key)) for values in shown}
        if len(labels) > distinct:
            chosen, distinct = [*chosen, key], len(labels)
    return tuple(chosen) or ("trigger.name", "applicator.name", "poison.rate")


def _describe(differing: Differing) -> tuple[tuple[str, str, str], ...]:
    said = []
    for (key, group), sets in differing.items():
        texts = [", ".join(sorted(label(key, value) for value in values)) for values in sets]
        if sets[0] != sets[1]:
            said.append((f"{key} of {group}" if group else key, texts[0], texts[1]))
    return tuple(said)


def _results_of_runs(side: Side, number: int) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Return digest and metrics of the finished runs of a side's cell; they identify a run regardless of its folder."""
    specs = side.results.suite.cells[number].runs(side.results.suite.repeats)
    return [
        (record.digest, record.metrics) for spec in specs if (record := side.results.record(spec)) is not None
    ]


def _same_models(a: Side, n: int, b: Side, m: int) -> bool:
    """Return whether two cells are of the same trained models, apart from their defenses."""
    specs = (side.results.suite.cells[number].spec for side, number in ((a, n), (b, m)))
    first, second = (seedless_digest(replace(spec, defenses=())) for spec in specs)
    return first == second


def _values(side: Side, cell: Cell, metrics: Sequence[str]) -> dict[str, Value]:
    places = {metric: find_place(side.results, cell, metric) for metric in metrics}
    return {metric: Value(place.state, place.statistic) for metric, place in places.items()}
