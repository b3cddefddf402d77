"""Published values with which measured ones are compared."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backdoorbench_moe.bench.suites.files import find_file
from backdoorbench_moe.bench.suites.suite import Suite, matches, value_of
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import METRICS

# Column of a published table -> the corresponding key of a spec (see `value_of`).
KEYS = {
    "dataset": "dataset.name",
    "model": "model.name",
    "trigger": "trigger.name",
    "applicator": "applicator.name",
    "attack": "attack.name",
    "similarity": "attack.similarity",
    "k": "attack.k",
    "tokens": "attack.tokens",
    "layers": "attack.layers",
    "preference_epochs": "attack.preference_epochs",
    "gate": "gate.name",
    "experts": "mixture.experts",
    "poisoned": "mixture.poisoned",
}
# Columns whose value is computed; see `_computed`.
COMPUTED = ("poison_rate_percent", "prune_rate_percent", "stage", "balance", "align", "defensive_expert")
# Columns that state a defense, and the defense. Without such a column, a table is one of undefended models.
DEFENSES = {"prune_rate_percent": "fine-pruning", "align": "align", "defensive_expert": "defensive-expert"}
# Column of a table of shapes: the model on which a row was measured.
BASE_MODEL = "base_model"
# Text for a part that a spec does not have, such as an attack.
NONE = "none"

NUMBERS = {*METRICS, "poison_rate_percent", "prune_rate_percent"}


@dataclass(frozen=True)
class PaperTable:
    """A published table.

    Args:
        rows: The rows, each a mapping from column to text. An empty text in a column of `KEYS` matches any value.
        where: Keys and values that a spec must have for the table to apply to it.
        is_shape: Whether the values were measured on models of another kind, named in the column "base_model". They
            show the order and pattern of the values in a table; no measured value is compared with them.
        fixed: Columns with one value in all rows, which is not compared with that of a run.
    """

    rows: tuple[Mapping[str, str], ...] = ()
    where: Mapping[str, Any] | None = None
    is_shape: bool = False
    fixed: Collection[str] = ()

    def value(self, spec: RunSpec, metric: str) -> float | None:
        """Look up the published mean of a metric.

        Args:
            spec: Spec of a run.
            metric: Key of the metric; "pruned.asr" is the ASR after the stage "pruned" of a defense.

        Returns:
            The mean in the metric's unit; None if the table has no value for this spec, or is a table of shapes.
        """
        text = "" if self.is_shape else next(self._texts(spec, metric, self.rows), "")
        return float(text) if text else None

    def rounding(self, spec: RunSpec, metric: str) -> float:
        """Return half a unit of the last published digit: "96.6" stands for 96.6 ± 0.05."""
        text = next(self._texts(spec, metric, self.rows), "")
        return 0.5 * 10.0 ** -len(text.partition(".")[2]) if text else 0.0

    @property
    def models(self) -> tuple[str, ...]:
        """The models of a table of shapes, in its order; empty for other tables."""
        return tuple(dict.fromkeys(row[BASE_MODEL] for row in self.rows)) if self.is_shape else ()

    def shape(self, spec: RunSpec, metric: str, model: str) -> float | None:
        """Look up the value published for another kind of model; None if there is none."""
        rows = [row for row in self.rows if self.is_shape and row[BASE_MODEL] == model]
        text = next(self._texts(spec, metric, rows), "")
        return float(text) if text else None

    def _texts(self, spec: RunSpec, metric: str, rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yield the text of a metric in the first of these rows that matches a spec, unless it is empty."""
        stage, _, name = metric.rpartition(".")
        if not rows or not matches(spec, self.where or {}):
            return
        stated = {defense for column, defense in DEFENSES.items() if column in rows[0]}
        if (stage and "stage" not in rows[0]) or any(part.name not in stated for part in spec.defenses):
            return
        expected: dict[str, Any] = {}
        for row in rows:
            columns = ({*KEYS, *COMPUTED} & row.keys()) - {*self.fixed}
            expected = expected or _column_values(spec, stage, columns)
            if all(_agrees(row[column], value) for column, value in expected.items()):
                yield from filter(None, [row.get(name)])
                return


def load_paper(suite: Suite) -> PaperTable:
    """Load the published table of a suite.

    In addition to `file`, `where` and `shape`, a suite's `paper` may fix columns of the file, such as `table: 1`: only
    rows with these values are used, and the columns are not compared with runs. With `shape: true`, the values are
    shown in separate columns, and nothing is compared with them.

    Returns:
        The table; an empty one for a suite without a published table.

    Raises:
        ConfigError: The file is not a table with the required columns, rows and numbers.
    """
    if suite.paper is None:
        return PaperTable()
    fixed = {key: item for key, item in suite.paper.items() if key not in ("file", "where", "shape")}
    is_shape = bool(suite.paper.get("shape"))
    needed = [*fixed, *([BASE_MODEL] if is_shape else [])]
    file = find_file(suite.paper["file"], "paper", "published table", suffix=".csv")
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"published table {file.name}: cannot be read: {error}") from error
    if not rows or not METRICS.keys() & rows[0].keys() or not {*needed} <= rows[0].keys():
        columns = [*needed, "one of " + "/".join(METRICS)]
        raise ConfigError.expected(f"published table {file.name}", f"the columns {columns}", list(rows[:1]))
    chosen = [row for row in rows if all(row[key] == str(item) for key, item in fixed.items())]
    if not chosen:
        raise ConfigError.expected(f"published table {file.name}", f"a row with {fixed}", None)
    for number, row in enumerate(rows, 2):
        if None in row or not all(_is_number(row[key]) for key in NUMBERS & row.keys() if row[key] != ""):
            raise ConfigError.expected(
                f"published table {file.name}: line {number}", "names and numbers", row
            )
    return PaperTable(tuple(chosen), suite.paper.get("where"), is_shape, tuple(fixed))


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def _column_values(spec: RunSpec, stage: str, columns: Collection[str]) -> dict[str, Any]:
    """Return the value that each of these columns must have in the row of this spec."""
    found = {column: value_of(spec, KEYS[column]) for column in KEYS.keys() & columns}
    computed = _computed(spec, stage)
    return found | {column: computed[column] for column in computed.keys() & columns}


def _computed(spec: RunSpec, stage: str) -> dict[str, Any]:
    defenses = spec.to_dict().get("defenses", [])
    scopes = [part.get("scope", "gates") for part in defenses if part["name"] == "align"]
    is_defended = any(part["name"] == "defensive-expert" for part in defenses)
    return {
        "poison_rate_percent": 100 * spec.poison.rate,
        "prune_rate_percent": 100 * defenses[-1].get("ratio", math.nan) if defenses else 0.0,
        "stage": stage or ("finetuned" if defenses else "before"),
        "balance": "yes" if value_of(spec, "gate.balance") else None,
        "align": scopes[-1] if scopes else None,
        "defensive_expert": "yes" if is_defended else None,
    }


def _agrees(text: str, value: Any) -> bool:
    if text == "":
        return True
    if value is None:
        return text == NONE
    if isinstance(value, int | float):
        return _is_number(text) and math.isclose(float(text), value, rel_tol=1e-9, abs_tol=1e-12)
    return text == value
