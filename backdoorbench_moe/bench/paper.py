"""Published numbers, to stand beside measured ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.bench.files import find_file
from backdoorbench_moe.bench.suite import METRICS, Suite, value_of
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.errors import ConfigError

# Column of a published table -> what it says of a spec.
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
    """The rows of a published table, and the specs it speaks of (`where`: key -> value)."""

    rows: tuple[Mapping[str, str], ...] = ()
    where: Mapping[str, Any] | None = None

    def value(self, spec: RunSpec, metric: str) -> float | None:
        """The published mean of a metric in percent; None where the paper has none.

        metric: "asr" and so on; "pruned.asr" is that of a defense's stage.
        """
        stage, _, name = metric.rpartition(".")
        if any(value_of(spec, key) != wanted for key, wanted in (self.where or {}).items()):
            return None
        said = _said_of(spec, stage)
        for row in self.rows:
            if all(_agrees(row[column], said[column]) for column in KEYS if column in row):
                return float(row[name]) if row.get(name) else None
        return None


def load_paper(suite: Suite) -> PaperTable:
    """The published table a suite names; an empty one where it names none.

    Beside `file` and `where` a suite may fix columns of the file, such as `table: 1`. Raises ConfigError
    for a file that is no table.
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
    if not rows or not set(METRICS) & rows[0].keys() or not fixed.keys() <= rows[0].keys():
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


def _said_of(spec: RunSpec, stage: str) -> dict[str, Any]:
    """What each column would have to be for a row to speak of this spec."""
    defenses = spec.to_dict().get("defenses", [])
    said = {
        column: value_of(spec, key) for column, key in KEYS.items() if not key.startswith(("defense", "st"))
    }
    said["poison_rate_percent"] = 100 * spec.poison.rate
    said["prune_rate_percent"] = 100 * defenses[-1].get("ratio", math.nan) if defenses else 0.0
    said["stage"] = stage or ("finetuned" if defenses else "before")
    return said


def _agrees(text: str, value: Any) -> bool:
    if isinstance(value, float):
        return math.isclose(float(text), value, rel_tol=1e-9, abs_tol=1e-12)
    return text == value
