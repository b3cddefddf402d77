"""Published numbers that measured ones are compared with."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.bench.files import find_file
from backdoorbench_moe.bench.suite import Suite, value_of
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import METRICS

# Column of a published table -> the key of a spec that it gives (see `value_of`).
KEYS = {
    "dataset": "dataset.name",
    "model": "model.name",
    "trigger": "trigger.name",
    "applicator": "applicator.name",
    "poison_rate_percent": "poison.rate",
    "prune_rate_percent": "defense.ratio",
    "stage": "stage",
}

NUMBERS = {*METRICS, "poison_rate_percent", "prune_rate_percent"}


@dataclass(frozen=True)
class PaperTable:
    """A published table.

    Args:
        rows: Its rows, column -> text.
        where: Keys and values that a spec must have for the table to apply to it.
    """

    rows: tuple[Mapping[str, str], ...] = ()
    where: Mapping[str, Any] | None = None

    def value(self, spec: RunSpec, metric: str) -> float | None:
        """Look up the published mean of a metric.

        Args:
            spec: Spec of a run.
            metric: Key of the metric; "pruned.asr" is the ASR after the stage "pruned" of a defense.

        Returns:
            The mean in the metric's unit; None if the table has none for this spec.
        """
        text = self._text(spec, metric)
        return float(text) if text else None

    def rounding(self, spec: RunSpec, metric: str) -> float:
        """Give half a unit of the last published digit: "96.6" stands for 96.6 ± 0.05."""
        text = self._text(spec, metric)
        return 0.5 * 10.0 ** -len(text.partition(".")[2]) if text else 0.0

    def _text(self, spec: RunSpec, metric: str) -> str:
        stage, _, name = metric.rpartition(".")
        if any(value_of(spec, key) != wanted for key, wanted in (self.where or {}).items()):
            return ""
        expected = _column_values(spec, stage)
        for row in self.rows:
            if all(_agrees(row[column], expected[column]) for column in KEYS if column in row):
                return row.get(name) or ""
        return ""


def load_paper(suite: Suite) -> PaperTable:
    """Load the published table of a suite.

    Beside `file` and `where`, a suite's `paper` may fix columns of the file, such as `table: 1`.

    Returns:
        The table; an empty one for a suite without one.

    Raises:
        ConfigError: If the file is not a table with the columns, rows and numbers that are needed.
    """
    if suite.paper is None:
        return PaperTable()
    fixed = {key: item for key, item in suite.paper.items() if key not in ("file", "where")}
    file = find_file(suite.paper["file"], "paper", "published table", suffix=".csv")
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"published table {file.name}: cannot be read: {error}") from error
    if not rows or not METRICS.keys() & rows[0].keys() or not fixed.keys() <= rows[0].keys():
        needed = [*fixed, "one of " + "/".join(METRICS)]
        raise ConfigError.expected(f"published table {file.name}", f"the columns {needed}", list(rows[:1]))
    kept = tuple(row for row in rows if all(row[key] == str(item) for key, item in fixed.items()))
    if not kept:
        raise ConfigError.expected(f"published table {file.name}", f"a row with {fixed}", None)
    for number, row in enumerate(rows, 2):
        if None in row or not all(_is_number(row[key]) for key in NUMBERS & row.keys() if row[key] != ""):
            raise ConfigError.expected(
                f"published table {file.name}: line {number}", "names and numbers", row
            )
    return PaperTable(kept, suite.paper.get("where"))


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def _column_values(spec: RunSpec, stage: str) -> dict[str, Any]:
    """The value that each column must have in the row of this spec."""
    defenses = spec.to_dict().get("defenses", [])
    values = {
        column: value_of(spec, key) for column, key in KEYS.items() if not key.startswith(("defense", "st"))
    }
    values["poison_rate_percent"] = 100 * spec.poison.rate
    values["prune_rate_percent"] = 100 * defenses[-1].get("ratio", math.nan) if defenses else 0.0
    values["stage"] = stage or ("finetuned" if defenses else "before")
    return values


def _agrees(text: str, value: Any) -> bool:
    if isinstance(value, float):
        return math.isclose(float(text), value, rel_tol=1e-9, abs_tol=1e-12)
    return text == value
