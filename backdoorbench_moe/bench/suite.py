"""A suite: a base spec, a grid over any of its keys, repeats, and what to draw from the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backdoorbench_moe.config import PARTS, RunSpec
from backdoorbench_moe.engine.graph import in_order
from backdoorbench_moe.errors import ConfigError, UnknownNameError

# As a table's columns: the metrics of one table side by side, instead of one table for each metric.
METRIC_COLUMNS = "metric"


@dataclass(frozen=True)
class Layout:
    """The layout of tables: one table for each metric.

    Args:
        title: Title of the tables.
        rows: Keys (see `value_of`): one row for each combination of their values.
        columns: A key: one column for each of its values. With `METRIC_COLUMNS` ("metric") there is one
            table in all, with one column for each metric.
        metrics: Keys of metrics (see `backdoorbench_moe.metrics`); "pruned.asr" is the ASR after the
            stage "pruned" of a defense.
        no_trigger: Put the target rate without the trigger beside every ASR, if any run measured it.
            A high ASR means little where the model calls the same images the target anyway.
    """

    title: str
    rows: tuple[str, ...]
    columns: str
    metrics: tuple[str, ...] = ("asr",)
    no_trigger: bool = True


@dataclass(frozen=True)
class Plot:
    """A figure: a metric over a number on a log axis.

    Args:
        title: Title of the figure.
        x: Key of the number (see `value_of`).
        panels: Key with one panel for each of its values.
        lines: Key with one line for each of its values.
        metric: Key of the metric.
    """

    title: str
    x: str = "poison.rate"
    panels: str = "trigger.name"
    lines: str = "applicator.name"
    metric: str = "asr"


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Args:
        values: The value of each key of the grid.
        spec: The spec they make, with the suite's first seed.
    """

    values: Mapping[str, Any]
    spec: RunSpec

    def runs(self, repeats: int) -> list[RunSpec]:
        """The specs of the cell's runs, one for each seed."""
        return [replace(self.spec, seed=self.spec.seed + n) for n in range(repeats)]


@dataclass(frozen=True)
class Suite:
    """A suite at one scale, its grid laid out.

    Args:
        name: Name of the suite.
        title: Title of its page.
        version: Raised by the author whenever the suite's runs change; results folders keep it.
        scale: Name of the scale; None for a suite without scales.
        note: What the scale cuts down; shown with every table.
        repeats: Number of seeds a cell.
        cells: The cells of all grids.
        tables: Layouts of its tables; the default layout if empty.
        plots: Its figures.
        paper: The published table it is compared with (see `bench.paper`), if any.
    """

    name: str
    title: str
    version: int
    scale: str | None
    note: str
    repeats: int
    cells: tuple[Cell, ...]
    tables: tuple[Layout, ...] = ()
    plots: tuple[Plot, ...] = ()
    paper: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """Name and scale, for messages and folders."""
        return self.name if self.scale is None else f"{self.name}-{self.scale}"

    @property
    def digest(self) -> str:
        """Ten hex digits of a hash over the digests of all cells; the number of repeats does not change it."""
        digests = sorted(cell.spec.digest for cell in self.cells)
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:10]

    def runs(self) -> list[RunSpec]:
        """The runs of all cells, the first seed of every cell before the second of any."""
        return [cell.runs(self.repeats)[n] for n in range(self.repeats) for cell in self.cells]

    def with_repeats(self, repeats: int) -> Suite:
        """Change the number of seeds a cell.

        Raises:
            ConfigError: If it is below 1.
        """
        if repeats < 1:
            raise ConfigError.expected("repeats", "at least 1", repeats)
        return replace(self, repeats=repeats)

    def only(self, filters: Sequence[str]) -> Suite:
        """Keep the cells that match every filter.

        Args:
            filters: Each is "key=value[,value]", with a key of `value_of`.

        Raises:
            ConfigError: If a filter is malformed, names an unknown value, or no cell is left.
        """
        cells = self.cells
        for text in filters:
            key, equals, wanted = text.partition("=")
            if not equals:
                raise ConfigError.expected("--only", "key=value[,value]", text)
            # A part is matched by its name; its options do not matter.
            key = f"{key}.name" if key in PARTS else key
            there = {_shown(value_of(cell.spec, key)) for cell in self.cells}
            asked = {_shown(_scaled(part.strip())) for part in wanted.split(",")}
            if unknown := sorted(asked - there):
                hint = "; another key goes into an --only of its own" if "=" in unknown[0] else ""
                raise UnknownNameError(f"--only {key}: value", unknown[0], there, hint)
            cells = tuple(cell for cell in cells if _shown(value_of(cell.spec, key)) in asked)
        if not cells:
            raise ConfigError(f"--only: {' and '.join(filters)} leave no cell of {self.label}")
        return replace(self, cells=cells)


def order(suite: Suite) -> Iterator[RunSpec]:
    """Yield every run once, with all that it needs, in the order in which they are made.

    The first seed of every cell comes before the second of any, so a stopped suite is even; see `graph.in_order`.
    """
    seen = set()
    for n in range(suite.repeats):
        for spec in in_order(cell.runs(suite.repeats)[n] for cell in suite.cells):
            if spec.digest not in seen:
                seen.add(spec.digest)
                yield spec


def value_of(spec: RunSpec, key: str) -> Any:
    """Look up a dotted key in a spec.

    "trigger" gives the part's label, such as "square, size=1"; "trigger.name" gives "square"; "trigger.size" gives 1,
    or None if the option is not given. The folders of data and files are left out, as they differ between machines.

    Raises:
        UnknownNameError: If a spec has no such key.
    """
    spec = spec.without_folders()
    values: Any = {"defenses": [], **spec.to_dict()}
    values["attack"] = None if spec.attack is None else spec.attack.to_dict()
    if key in PARTS:
        return part_label(values.get(key))
    if key == "defenses":
        return ", ".join(part_label(part) or "" for part in values[key]) or "none"
    first, *rest = key.split(".")
    if first not in values:
        raise UnknownNameError("key", key, values)
    value = values[first]
    for name in rest:
        if value is None:
            return None
        if not isinstance(value, dict) or (first in ("poison", "train") and name not in value):
            raise UnknownNameError(
                "key", key, [f"{first}.{k}" for k in value] if isinstance(value, dict) else []
            )
        value = value.get(name)
    return value


def part_label(part: Mapping[str, Any] | None) -> str | None:
    """Write a part in one line, such as "warp, grid_size=4, strength=0.5"; None for no part."""
    if part is None:
        return None
    return ", ".join([part["name"], *(f"{key}={value}" for key, value in part.items() if key != "name")])


def _scaled(text: str) -> object:
    """Read one value of --only: a number, a percentage such as 0.5%, or text."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return text


def _shown(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else str(value).lower() if isinstance(value, bool) else str(value)
