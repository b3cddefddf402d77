"""Reading suites from YAML files: merge the scale, expand the grid, check everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from backdoorbench_moe.bench.suites.files import find_file, names_in
from backdoorbench_moe.bench.suites.suite import (
    METRIC_COLUMNS,
    PARTS,
    Cell,
    Layout,
    Plot,
    Suite,
    check_key,
    value_of,
)
from backdoorbench_moe.config import RunSpec, Values, build_spec, load_yaml, merge, normalise
from backdoorbench_moe.config.shorthand import read_rate
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.metrics import metric
from backdoorbench_moe.ops.ranges import check_repeats
from backdoorbench_moe.options import convert

SUITE_FILE = "suite file"


def load_suite(name: str, scale: str | None = None, *, what: str = "suite") -> Suite:
    """Read a suite and expand its grid.

    Args:
        name: Name of a built-in suite, or path of a YAML file.
        scale: One of the suite's scales; the first by default.
        what: What the caller takes, for the error message if there is no such suite.

    Raises:
        UnknownNameError: The suite, or its scale, or a key or part in it does not exist.
        ConfigError: There is no file at the path, or a value is invalid; only what can be checked without data is
            checked. The message names the suite, the key and the cell.
    """
    file = find_file(name, "suites", what)
    return parse_suite(load_yaml(file, SUITE_FILE), file.stem, scale, folder=file.parent)


def load_named(text: str, *, what: str = "suite") -> Suite:
    """Read a suite given as SUITE or SUITE:SCALE; see `load_suite`."""
    return load_suite(*split_scale(text), what=what)


def split_scale(text: str) -> tuple[str, str | None]:
    """Split SUITE:SCALE, or SUITE, into name and scale. Raises ConfigError if either is empty."""
    name, colon, scale = text.rpartition(":") if ":" in text else (text, "", None)
    if colon and not (name and scale):
        raise ConfigError.expected("suite", "SUITE or SUITE:SCALE", text)
    return name, scale


SUITE_KEYS = (
    "title",
    "description",
    "version",
    "scales",
    "base",
    "grid",
    "repeats",
    "tables",
    "plots",
    "paper",
)


def parse_suite(values: Values, name: str, scale: str | None = None, *, folder: Path | None = None) -> Suite:
    """Build a suite from the values of its file (see `load_suite`).

    Args:
        values: Content of the YAML file.
        name: Name of the suite.
        scale: One of the suite's scales; the first by default.
        folder: Folder of the file; scales are searched in its subfolder `scales`.
    """
    where = f"suite {name}"
    for key in values:
        if key not in SUITE_KEYS:
            raise UnknownNameError(f"{where}: key", str(key), SUITE_KEYS)
    for key in ("title", "version", "grid"):
        if key not in values:
            raise ConfigError.expected(f"{where}: {key}", "it to be given", None)
    version, repeats = (_count(values.get(key, 1), f"{where}: {key}") for key in ("version", "repeats"))
    check_repeats(f"{where}: repeats", repeats)
    scale, scaled = _load_scale(values.get("scales"), scale, where, folder)
    base = _mapping(values.get("base", {}), f"{where}: base")
    cells = tuple(_lay_out(values["grid"], base, scaled, where))
    tables = _read_items(Layout, values.get("tables", []), f"{where}: tables")
    plots = _read_items(Plot, values.get("plots", []), f"{where}: plots")
    suite = Suite(
        name=name,
        title=convert(values["title"], str, f"{where}: title"),
        version=version,
        scale=scale,
        note=str(scaled.get("note", "")),
        repeats=repeats,
        cells=cells,
        tables=tuple(replace(table, where=_by_name(table.where, cells)) for table in tables),
        plots=tuple(replace(plot, where=_by_name(plot.where, cells)) for plot in plots),
        paper=_read_paper(values.get("paper"), where),
        description=" ".join(convert(values.get("description", ""), str, f"{where}: description").split()),
    )
    _check(suite, where)
    return suite


def _load_scale(
    scales: object, wanted: str | None, where: str, folder: Path | None
) -> tuple[str | None, Values]:
    """Load the chosen scale; return its name and its values (note, spec keys, and options for each model)."""
    if scales is None:
        if wanted is not None:
            raise ConfigError(f"--scale: {where} has no scales, got {wanted!r}")
        return None, {}
    if not isinstance(scales, list) or not scales or not all(isinstance(item, str) for item in scales):
        raise ConfigError.expected(f"{where}: scales", "a list of names", scales)
    name = wanted if wanted is not None else scales[0]
    if name not in scales:
        raise UnknownNameError(f"{where}: scale", name, scales)
    file = find_file(name, "suites/scales", "scale", folder and folder / "scales")
    return name, load_yaml(file, "scale file")


def _lay_out(grid: object, base: Values, scaled: Values, where: str) -> Iterator[Cell]:
    """Yield a cell for every combination of values of each grid."""
    scaled = {key: value for key, value in scaled.items() if key != "note"}
    models = _mapping(scaled.pop("models", {}), f"{where}: scale: models")
    models = {name: _mapping(options, f"{where}: scale: models: {name}") for name, options in models.items()}
    if grid == []:
        raise ConfigError.expected(f"{where}: grid", "at least one key", grid)
    for number, axes in enumerate(grid if isinstance(grid, list) else [grid]):
        place = f"{where}: grid[{number}]" if isinstance(grid, list) else f"{where}: grid"
        axes = _mapping(axes, place)
        if not axes:
            raise ConfigError.expected(place, "at least one key", axes)
        lists = {key: item if isinstance(item, list) else [item] for key, item in axes.items()}
        for key, items in lists.items():
            if not items:
                raise ConfigError.expected(f"{place}: {key}", "at least one value", items)
        for combination in itertools.product(*lists.values()):
            chosen = dict(zip(lists, combination, strict=True))
            yield Cell(chosen, _build(chosen, base, scaled, models, place))


def _build(chosen: Values, base: Values, scaled: Values, models: Values, place: str) -> RunSpec:
    # Set parts before their options, regardless of the order in the file, as naming a part resets its options.
    ordered = sorted(chosen.items(), key=lambda item: item[0].count("."))
    layers = [base, *(_nest(key, value) for key, value in ordered)]
    shown = ", ".join(f"{key}={value}" for key, value in chosen.items())
    try:
        # The scale is the lowest layer: values that the suite sets for a model or a data set take precedence.
        layers = [normalise(layer) for layer in layers]
        # An attack may imply the model.
        named = build_spec(scaled, *layers)
        model, data = named.model.name, named.dataset.name
        options = {"model": {"name": model, **models.get(model, {})}}
        if named.surrogate is not None:
            surrogate = named.surrogate.name
            options["surrogate"] = {"name": surrogate, **models.get(surrogate, {})}
        # A scale's data set applies to suites that name none; its options apply to any data set.
        size = {key: value for key, value in normalise(scaled).get("dataset", {}).items() if key != "name"}
        below = merge({"dataset": {"name": data}}, {**scaled, "dataset": size}, options)
        spec = build_spec(below, *layers)
        # A suite's digest and tables must not need data, so classes are given by number.
        spec.poison.check_numbered()
        return pin_files(spec)
    except ConfigError as error:
        raise ConfigError(f"{place}: {shown}: {error}") from error


def _nest(key: str, value: Any) -> Values:
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast(Values, value)


def _check(suite: Suite, where: str) -> None:
    """Check that no run is listed twice, and that tables, plots and `paper` use existing keys and metrics."""
    seen: dict[str, Cell] = {}
    for cell in suite.cells:
        if (twin := seen.setdefault(replace(cell.spec, seed=0).digest, cell)) is not cell:
            raise ConfigError(
                f"{where}: grid: {dict(cell.values)} is the same run as {dict(twin.values)}"
                + ("; for more seeds per cell, use repeats" if cell.spec.seed != twin.spec.seed else "")
            )
    for table in suite.tables:
        place = f"{where}: tables: {table.title}"
        for key in table.metrics:
            check_metric(key, f"{where}: tables")
        _check_keys(suite, table.rows, f"{place}: rows")
        if table.columns != METRIC_COLUMNS:
            _check_keys(suite, (table.columns,), f"{place}: columns", METRIC_COLUMNS)
        _check_where(suite, table.where, place)
    for plot in suite.plots:
        place = f"{where}: plots: {plot.title}"
        check_metric(plot.metric, f"{where}: plots")
        for name in ("x", "panels", "lines"):
            _check_keys(suite, (getattr(plot, name),), f"{place}: {name}")
        _check_where(suite, plot.where, place)
        if not any(plot.shows(cell.spec) for cell in suite.cells):
            raise ConfigError(f"{place}: x: expected a key that has a value in some cell, got {plot.x!r}")
    if suite.paper is not None:
        _check_keys(suite, suite.paper.get("where", {}), f"{where}: paper: where")


def _check_keys(suite: Suite, keys: Iterable[str], place: str, *others: str) -> None:
    """Check that specs have these keys; `others` are valid at this place, too."""
    for key in keys:
        check_key([cell.spec for cell in suite.cells], key, place, *others)


def _check_where(suite: Suite, where: Mapping[str, Any], place: str) -> None:
    """Check that some cell has the values by which a table or plot selects cells."""
    _check_keys(suite, where, f"{place}: where")
    cells = list(suite.cells)
    for key, wanted in where.items():
        there = {value_of(cell.spec, key): None for cell in cells}
        cells = [cell for cell in cells if value_of(cell.spec, key) == wanted]
        if not cells:
            known = " or ".join(map(repr, there))
            raise ConfigError(
                f"{place}: shows no cell of the grid; where: {key}: expected {known}, got {wanted!r}"
            )


def check_metric(key: str, where: str) -> None:
    """Check that a metric exists.

    Raises:
        UnknownNameError: It does not exist; the message begins with `where`.
    """
    metric(key, f"{where}: metric")


def _read_items(kind: Any, items: object, where: str) -> Iterator[Any]:
    if not isinstance(items, list):
        raise ConfigError.expected(where, "a list", items)
    known = get_type_hints(kind)
    required = [each.name for each in fields(kind) if each.default is each.default_factory is MISSING]
    for item in items:
        item = _mapping(item, where)
        place = f"{where}: {item['title']}" if isinstance(item.get("title"), str) else where
        for key, value in item.items():
            if key not in known:
                raise UnknownNameError(f"{place}: key", key, known)
            here = f"{place}: {key}"
            item[key] = _read_where(value, here) if key == "where" else convert(value, known[key], here)
            if item[key] == ():
                raise ConfigError.expected(here, "at least one", value)
        for key in required:
            if key not in item:
                raise ConfigError.expected(f"{place}: {key}", "it to be given", None)
        yield kind(**item)


def _read_where(value: object, where: str) -> Values:
    """Read the values by which cells are selected; like in the grid, rates may be percentages."""
    return {
        key: read_rate(f"{where}: {key}", wanted) if isinstance(wanted, str) else wanted
        for key, wanted in _mapping(value, where).items()
    }


def _by_name(where: Mapping[str, Any], cells: Sequence[Cell]) -> Values:
    """Select parts by name, such as "square", unless a cell has the part without options or with these options."""
    found: Values = {}
    for key, wanted in where.items():
        name = f"{key}.name"
        if key in PARTS and not any(value_of(cell.spec, key) == wanted for cell in cells):
            is_name = any(value_of(cell.spec, name) == wanted for cell in cells)
            key = name if is_name else key
        found[key] = wanted
    return found


def _read_paper(paper: object, where: str) -> Values | None:
    if paper is None:
        return None
    values: Values = {"file": paper} if isinstance(paper, str) else _mapping(paper, f"{where}: paper")
    if not isinstance(values.get("file"), str):
        raise ConfigError.expected(f"{where}: paper", "the name of a published table", paper)
    if "where" in values:
        values["where"] = _read_where(values["where"], f"{where}: paper: where")
    values["shape"] = convert(values.get("shape", False), bool, f"{where}: paper: shape")
    return values


def _mapping(value: object, where: str) -> Values:
    if not isinstance(value, dict):
        raise ConfigError.expected(where, "a mapping", value)
    return {str(key): item for key, item in value.items()}


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError.expected(where, "an integer of at least 1", value)
    return value


def list_suites() -> list[str]:
    """List the names of the built-in suites."""
    return names_in("suites")


def list_scales(name: str) -> list[str]:
    """List the scales of a suite, the default first."""
    scales = load_yaml(find_file(name, "suites", "suite"), SUITE_FILE).get("scales") or []
    if not isinstance(scales, list):
        raise ConfigError.expected(f"{name}: scales", "a list of names", scales)
    return scales
