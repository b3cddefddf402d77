"""A suite: a base spec, a grid over any of its keys, repeats, and what to draw from the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backdoorbench_moe.config import DATASET_NOT_IN_DIGEST, PARTS, RunSpec
from backdoorbench_moe.engine.graph import in_order
from backdoorbench_moe.errors import ConfigError, UnknownNameError

METRICS = ("asr", "ba", "cad", "ra")
# Of input filters; and how long a defense, or else the training, took.
FILTER_METRICS = ("auroc", "tpr", "fpr")
MEASURES = (*METRICS, *FILTER_METRICS, "seconds")
# As a table's columns: its metrics side by side, instead of a table for each.
METRIC_COLUMNS = "metric"


@dataclass(frozen=True)
class Layout:
    """One table a metric: a row for each combination of the `rows` keys, a column for each of `columns`.

    Keys are those of `value_of`: dotted keys of a spec, or a part's ("trigger": its name and options). With
    METRIC_COLUMNS ("metric") for columns it is one table, with a column a metric. metrics: of MEASURES;
    "pruned.asr" is the ASR after a defense's stage "pruned".
    """

    title: str
    rows: tuple[str, ...]
    columns: str
    metrics: tuple[str, ...] = ("asr",)


@dataclass(frozen=True)
class Plot:
    """One figure: `metric` over `x` on a log axis, a panel for each of `panels`, a line for each of `lines`."""

    title: str
    x: str = "poison.rate"
    panels: str = "trigger.name"
    lines: str = "applicator.name"
    metric: str = "asr"


@dataclass(frozen=True)
class Cell:
    """One place in the grid: the axes' values and the spec they make, with the suite's first seed."""

    values: Mapping[str, Any]
    spec: RunSpec

    def runs(self, repeats: int) -> list[RunSpec]:
        """One spec a seed."""
        return [replace(self.spec, seed=self.spec.seed + n) for n in range(repeats)]


@dataclass(frozen=True)
class Suite:
    """A suite at one scale, its grid laid out.

    version: raised by its author when its runs change; result folders keep it. note: what the scale cuts
    down, for every table. paper: the published table beside it (see `paper`), if any.
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
        """Ten hex digits over all its runs' digests, whatever the number of repeats."""
        digests = sorted(cell.spec.digest for cell in self.cells)
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:10]

    def runs(self) -> list[RunSpec]:
        """The runs of all cells: a repeat of every cell before the next, so that a stopped suite is even."""
        return [cell.runs(self.repeats)[n] for n in range(self.repeats) for cell in self.cells]

    def with_repeats(self, repeats: int) -> Suite:
        """The same suite over another number of seeds. Raises ConfigError below 1."""
        if repeats < 1:
            raise ConfigError.expected("repeats", "at least 1", repeats)
        return replace(self, repeats=repeats)

    def only(self, filters: Sequence[str]) -> Suite:
        """The cells that every "key=value[,value]" admits. Raises ConfigError where a filter leaves none."""
        cells = self.cells
        for text in filters:
            key, equals, wanted = text.partition("=")
            if not equals:
                raise ConfigError.expected("--only", "key=value[,value]", text)
            # A part is meant by its name, whatever its options.
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
    """Every run once, with all that it needs; a repeat of all cells before the next, so a stopped suite is even."""
    seen = set()
    for n in range(suite.repeats):
        for spec in in_order(cell.runs(suite.repeats)[n] for cell in suite.cells):
            if spec.digest not in seen:
                seen.add(spec.digest)
                yield spec


def value_of(spec: RunSpec, key: str) -> Any:
    """The value of a dotted key in a spec; of a part, its label. Raises UnknownNameError for no such key.

    "trigger" is "square, size=1"; "trigger.name" is "square"; "trigger.size" is 1, None where not given.
    """
    values: Any = {"defenses": [], **spec.to_dict()}
    values["attack"] = None if spec.attack is None else spec.attack.to_dict()
    if key in PARTS:
        # Where the data lie is not a property of them.
        hidden = DATASET_NOT_IN_DIGEST if key == "dataset" else ()
        return part_label(values[key] and {k: v for k, v in values[key].items() if k not in hidden})
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
    """A part in one line: "warp, grid_size=4, strength=0.5"."""
    if part is None:
        return None
    return ", ".join([part["name"], *(f"{key}={value}" for key, value in part.items() if key != "name")])


def _scaled(text: str) -> object:
    """Read one value of --only: a rate may be written as 0.5%, a number as any."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return text


def _shown(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.6g}" if is_number else str(value).lower() if isinstance(value, bool) else str(value)
