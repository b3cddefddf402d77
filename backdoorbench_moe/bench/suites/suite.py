"""A suite: a base spec, a grid over any of its keys, repeats, and the tables and plots of its records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from backdoorbench_moe.config import PARTS, SURROGATE, MixtureSpec, PoisonSpec, RunSpec, TrainSpec
from backdoorbench_moe.engine.graph import in_order
from backdoorbench_moe.errors import BbmoeError, ConfigError, UnknownNameError
from backdoorbench_moe.ops.ranges import check_repeats
from backdoorbench_moe.options import REQUIRED
from backdoorbench_moe.registry import registry_of

# As the columns of a layout: one table with a column for each metric, instead of one table per metric.
METRIC_COLUMNS = "metric"
# A key of `value_of` whose value is computed from the spec.
POISONED_COUNT = "mixture.poisoned"
# Settings whose keys are checked here; those of parts are checked when the parts are built.
SETTINGS: Mapping[str, Any] = {
    name: {item.name: getattr(default, item.name) for item in fields(default)} | default.to_dict()
    for name, default in (("poison", PoisonSpec()), ("train", TrainSpec()), ("mixture", MixtureSpec()))
}


@dataclass(frozen=True)
class Layout:
    """The layout of tables: one table per metric.

    Args:
        title: Title of the tables.
        rows: Keys (see `value_of`): one row for each combination of their values.
        columns: A key: one column for each of its values. With `METRIC_COLUMNS` ("metric"), a single table with one
            column for each metric.
        metrics: Keys of metrics (see `backdoorbench_moe.metrics`); "pruned.asr" is the ASR after the
            stage "pruned" of a defense.
        no_trigger: Whether to show the target rate without the trigger next to every ASR, if any run measured it. A
            high ASR means little if the model predicts the target anyway.
        where: Only cells with these values, by key; all cells if empty.
    """

    title: str
    rows: tuple[str, ...]
    columns: str
    metrics: tuple[str, ...] = ("asr",)
    no_trigger: bool = True
    where: Mapping[str, Any] = field(default_factory=dict)

    def shows(self, spec: RunSpec) -> bool:
        """Whether a run appears in the tables."""
        return matches(spec, self.where)


@dataclass(frozen=True)
class Plot:
    """A figure: a metric over a number, or over names such as those of triggers.

    Cells without a value of `x`, such as an option of another attack, are omitted.

    Args:
        title: Title of the figure.
        x: Key of the number or name (see `value_of`).
        panels: Key with one panel for each of its values.
        lines: Key with one line for each of its values.
        metric: Key of the metric.
        scale: Scale of the x axis. With "log", the numbers must be positive. With "names", any values have equal
            distances, in the order of the suite's cells.
        where: Only cells with these values, by key; all cells if empty.
    """

    title: str
    x: str = "poison.rate"
    panels: str = "trigger.name"
    lines: str = "applicator.name"
    metric: str = "asr"
    scale: Literal["log", "linear", "names"] = "log"
    where: Mapping[str, Any] = field(default_factory=dict)

    def shows(self, spec: RunSpec) -> bool:
        """Whether a run appears in the figure."""
        return matches(spec, self.where) and value_of(spec, self.x) is not None


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Args:
        values: The value of each key of the grid.
        spec: The resulting spec, with the suite's first seed.
    """

    values: Mapping[str, Any]
    spec: RunSpec

    def runs(self, repeats: int) -> list[RunSpec]:
        """Return the specs of the cell's runs, one per seed."""
        made = self._runs
        made.extend(replace(self.spec, seed=self.spec.seed + n) for n in range(len(made), repeats))
        return made[:repeats]

    @cached_property
    def _runs(self) -> list[RunSpec]:
        """Specs already returned; tables look up each run many times, and a spec computes its digest only once."""
        return []


@dataclass(frozen=True)
class Suite:
    """A suite at one scale, with its grid expanded into cells.

    Args:
        name: Name of the suite.
        title: Title of its page.
        version: Increased by the author whenever the suite's runs change; stored in results folders. None for the
            defenses of one run, which are laid out like a suite (see `bench.running.defended`).
        scale: Name of the scale; None for a suite without scales.
        note: How the scale differs from the full experiment; shown with every table.
        repeats: Number of seeds per cell.
        cells: The cells of all grids.
        tables: Layouts of its tables; the default layout if empty.
        plots: Its figures.
        paper: The published table it is compared with (see `bench.suites.paper`), if any.
        description: The question that it answers, in a few sentences of plain text with `code`; may be empty.
    """

    name: str
    title: str
    version: int | None
    scale: str | None
    note: str
    repeats: int
    cells: tuple[Cell, ...]
    tables: tuple[Layout, ...] = ()
    plots: tuple[Plot, ...] = ()
    paper: Mapping[str, Any] | None = None
    description: str = ""

    @property
    def label(self) -> str:
        """Name and scale, for messages and folder names."""
        return self.name if self.scale is None else f"{self.name}-{self.scale}"

    @property
    def digest(self) -> str:
        """Ten hex digits of a hash over the digests of all cells; independent of the number of repeats."""
        digests = sorted(cell.spec.digest for cell in self.cells)
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:10]

    def runs(self) -> list[RunSpec]:
        """The runs of all cells, the first seed of every cell before the second of any."""
        return [cell.runs(self.repeats)[n] for n in range(self.repeats) for cell in self.cells]

    @cached_property
    def nodes(self) -> tuple[RunSpec, ...]:
        """Every run and the runs it depends on, once; see `order`. Cached, as building the specs is slow."""
        found: dict[str, RunSpec] = {}
        for n in range(self.repeats):
            for spec in in_order(cell.runs(self.repeats)[n] for cell in self.cells):
                found.setdefault(spec.digest, spec)
        return tuple(found.values())

    def with_repeats(self, repeats: int) -> Suite:
        """Return the suite with another number of seeds per cell.

        Raises:
            ConfigError: `repeats` is below 1, or too large.
        """
        check_repeats("repeats", repeats)
        return replace(self, repeats=repeats)

    def only(self, filters: Sequence[str]) -> Suite:
        """Return the suite with only the cells that match every filter.

        Args:
            filters: Strings "key=value[,value]", with a key of `value_of`.

        Raises:
            ConfigError: A filter is malformed or names an unknown value, or no cell is left.
        """
        cells = self.cells
        for text in filters:
            key, equals, wanted = text.partition("=")
            if not equals:
                raise ConfigError.expected("--only", "key=value[,value]", text)
            # Parts are matched by name only.
            key = f"{key}.name" if key in PARTS else key
            check_key([cell.spec for cell in self.cells], key, "--only")
            there = {filter_text(cell.spec, key) for cell in self.cells}
            asked = {_shown(_scaled(part.strip())) for part in wanted.split(",")}
            if unknown := sorted(asked - there):
                hint = "; use a separate --only for another key" if "=" in unknown[0] else ""
                raise UnknownNameError(f"--only {key}: value", unknown[0], there, hint)
            cells = tuple(cell for cell in cells if filter_text(cell.spec, key) in asked)
        if not cells:
            raise ConfigError(f"--only: {' and '.join(filters)} leave no cell of {self.label}")
        return replace(self, cells=cells, **_shown_of(cells, tables=self.tables, plots=self.plots))


def _shown_of(cells: Sequence[Cell], **items: Sequence[Any]) -> dict[str, Any]:
    """Return the tables and plots that show any of the cells."""
    return {
        name: tuple(each for each in those if any(each.shows(cell.spec) for cell in cells))
        for name, those in items.items()
    }


def seedless_digest(spec: RunSpec) -> str:
    """Return the digest that all seeds of a cell share."""
    return replace(spec, seed=0).digest


def matches(spec: RunSpec, where: Mapping[str, Any]) -> bool:
    """Return whether a spec has these values, by key."""
    return all(value_of(spec, key) == wanted for key, wanted in where.items())


def order(suite: Suite) -> Iterator[RunSpec]:
    """Yield every run and the runs it depends on, once, in execution order.

    The first seed of every cell comes before the second of any, so that an interrupted suite is balanced; see
    `graph.in_order`.
    """
    return iter(suite.nodes)


def value_of(spec: RunSpec, key: str) -> Any:
    """Look up a dotted key in a spec.

    "trigger" gives the part's label, such as "square, size=1"; "trigger.name" gives "square"; "trigger.size" gives 1,
    the part's default if the spec does not set the option, or None if the part has no such option. Lists are returned
    as text, such as "0, 1" for "mixture.poisoned_experts"; "mixture.poisoned" is the number of these experts. The value
    is None if the spec does not have the part, such as the gate of a model that is not merged. Folders of data and
    files are left out, as they differ between machines.

    Raises:
        UnknownNameError: The key does not exist.
    """
    if key == POISONED_COUNT:
        return None if spec.mixture is None else len(spec.mixture.poisoned_experts)
    values = _values(spec)
    if key in PARTS:
        return part_label(values[key])
    if key == "defenses":
        return ", ".join(part_label(part) or "" for part in values[key]) or "none"
    first, *rest = key.split(".")
    if first not in values:
        raise UnknownNameError("key", key, values)
    _check_setting(key)
    value = values[first]
    for place, name in enumerate(rest):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UnknownNameError("key", key, [])
        if first in PARTS and place == 0 and name not in value:
            return _as_text(_default(_kind(first), value["name"], name))
        value = value.get(name)
    return _as_text(value)


def part_of(spec: RunSpec, key: str) -> Mapping[str, Any] | None:
    """Return the name and the options of a part of a spec, without folders; None if the spec does not have it.

    Args:
        spec: The spec.
        key: One of `PARTS`.
    """
    part: Mapping[str, Any] | None = _values(spec)[key]
    return part


def _values(spec: RunSpec) -> dict[str, Any]:
    spec = spec.without_folders()
    # `to_dict` omits empty values.
    values: Any = {item.name: getattr(spec, item.name) for item in fields(spec)} | spec.to_dict()
    for name, part in (("attack", spec.attack), (SURROGATE, spec.surrogate)):
        values[name] = None if part is None else part.to_dict()
    return values


def check_key(specs: Sequence[RunSpec], key: str, where: str, *others: str) -> None:
    """Check that a key of `value_of` exists. The option of a part must be one of the parts in `specs`.

    Args:
        specs: The specs whose values are looked up, at least one.
        key: The key.
        where: Place of the key, with which the message begins.
        others: Keys that are valid at this place, too.

    Raises:
        UnknownNameError: The key does not exist; the message suggests similar ones.
    """
    try:
        value_of(specs[0], key)
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: key", key, [*error.known, *others]) from error
    first, _, option = key.partition(".")
    if first not in PARTS or option in ("", "name"):
        return
    parts = [part for spec in specs if (part := getattr(spec, first)) is not None]
    known = {name for part in parts for name in part.options}
    try:
        for name in {part.name for part in parts}:
            known.update(registry_of(_kind(first)).options(name))
    except BbmoeError:  # A part that is not installed may have any option.
        return
    if parts and option.partition(".")[0] not in known:
        raise UnknownNameError(f"{where}: key", key, [f"{first}.{name}" for name in ("name", *known)])


def _kind(part: str) -> str:
    """Return the kind of a part of a spec."""
    return "model" if part == SURROGATE else part


def _check_setting(key: str) -> None:
    """Raise UnknownNameError if a key of `SETTINGS` does not exist."""
    first, *rest = key.split(".")
    known, above = SETTINGS.get(first), first
    for name in rest:
        if known is None:
            return
        if not isinstance(known, Mapping) or name not in known:
            near = known if isinstance(known, Mapping) else ()
            raise UnknownNameError("key", key, [f"{above}.{each}" for each in near])
        known, above = known[name], f"{above}.{name}"


def _default(kind: str, name: str, option: str) -> Any:
    """Return the default of a part's option; None if the part is not installed or has no such option."""
    try:
        found = registry_of(kind).options(name).get(option)
    except BbmoeError:
        return None
    return None if found is None or found.default is REQUIRED else found.default


def _as_text(value: Any) -> Any:
    """Format a list as text; return other values unchanged."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def part_label(part: Mapping[str, Any] | None) -> str | None:
    """Format a part in one line, such as "warp, grid_size=4, strength=0.5"; None for no part."""
    if part is None:
        return None
    return ", ".join([part["name"], *(f"{key}={value}" for key, value in part.items() if key != "name")])


def _scaled(text: str) -> object:
    """Convert one value of --only: a number, a percentage such as 0.5%, or text."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return text


def filter_text(spec: RunSpec, key: str) -> str:
    """Return a value of a spec as written in --only; defenses by name only, since their options contain commas."""
    if key == "defenses":
        return "+".join(part.name for part in spec.defenses) or "none"
    return _shown(value_of(spec, key))


def _shown(value: object) -> str:
    if value is None:
        return "none"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else str(value).lower() if isinstance(value, bool) else str(value)
