"""Thresholds from a population of clean and attacked models, and their measured errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.ops.detection import threshold_rank

# Mixtures of merged experts have separate thresholds. They reject some images by design, and the checks find stamps for
# this as for a backdoor. Scores that are ordinary for them would be signs of a backdoor in other models.
FILE, MERGED_FILE, SCHEMA_VERSION = "calibration.json", "calibration-merged.json", 1
# With fewer clean models, the spread of their scores cannot be estimated.
FEWEST_CLEAN = 5


@dataclass(frozen=True)
class Threshold:
    """The calibrated threshold of one check.

    Attributes:
        centre: Mean score of clean models.
        value: The threshold.
        clean: Number of clean models that it was computed from.
        judges: Whether the check counts for the verdict, that is, whether it distinguished the attacked models of the
            population from the clean ones.
    """

    centre: float
    value: float
    clean: int
    judges: bool = True


@dataclass(frozen=True)
class Calibration:
    """A calibration of the checks.

    Attributes:
        level: The intended false alarm rate of the verdict, in (0, 1).
        thresholds: By name and version of the check, such as "gate-rows/1".
        document: The complete file: the population, the date and commit, and the measured errors.
    """

    level: float
    thresholds: Mapping[str, Threshold]
    document: Mapping[str, Any]

    def threshold(self, name: str, version: int) -> Threshold | None:
        """Return the threshold of a check; None if it was not calibrated in this version."""
        return self.thresholds.get(key_of(name, version))

    @property
    def line(self) -> str:
        """The origin of the thresholds, in one line."""
        population, verdict = self.document["population"], self.document["verdict"]["false_alarms"]
        kinds: dict[str | None, dict[str, None]] = {}
        for row in self.document.get("groups", ()):
            kinds.setdefault(row.get("dataset"), {})[row["model"]] = None
        names = "; ".join(
            ", ".join(models) + (f" on {data}" if data is not None else "") for data, models in kinds.items()
        )
        models = f"models ({names}; others were not measured)" if kinds else "models"
        source = f"from {population['calibrating']['clean']} clean {models}"
        if verdict is None:
            return (
                f"{source}; no check told the {population['calibrating']['attacked']} attacked ones from them"
            )
        return (
            f"{source}; on {population['measuring']['clean']} "
            f"other clean ones the verdict was wrong for {verdict['value']:.0f}% "
            f"(95% interval {verdict['low']:.0f} to {verdict['high']:.0f}%)"
        )


def key_of(name: str, version: int) -> str:
    """Return the key of a check in a calibration. Each version of a check has a separate threshold."""
    return f"{name}/{version}"


def set_threshold(clean: Sequence[float], level: float) -> Threshold:
    """Set a threshold that the score of a clean model exceeds with a probability of at most `level`.

    It is the larger of two values: the upper prediction limit for one further value of a normal distribution, and a
    limit for any distribution (`ops.detection.threshold_rank`), which is the highest score if there are too few scores.
    Since the scores may not be normal, the rate of clean models above the thresholds is measured on models that were
    not used to set them.

    Args:
        clean: Scores of clean models, at least `FEWEST_CLEAN`.
        level: In (0, 1).

    Raises:
        ValueError: There are too few scores.

    Source:
        Whitmore, "Prediction limits for a univariate normal observation", The American Statistician 40 (1986).
    """
    if len(clean) < FEWEST_CLEAN:
        raise ValueError(f"set_threshold: expected {FEWEST_CLEAN} scores, got {len(clean)}")
    values, count = np.asarray(clean, dtype=np.float64), len(clean)
    limit = values.mean() + t.isf(level, count - 1) * values.std(ddof=1) * math.sqrt(1 + 1 / count)
    ranked = np.sort(values)[-max(1, threshold_rank(level, count))]
    return Threshold(float(values.mean()), float(max(limit, ranked)), count)


def packaged(*, merged: bool = False) -> Calibration | None:
    """Return a calibration that is part of the package; None if there is none.

    Args:
        merged: Whether to return the calibration for mixtures of merged experts, or that for all other models.
    """
    name = MERGED_FILE if merged else FILE
    file = files("backdoorbench_moe.auditing") / name
    return parse(json.loads(file.read_text(encoding="utf-8")), name) if file.is_file() else None


def load(path: Path) -> Calibration:
    """Read a calibration. Raises RecordError if it cannot be read."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise RecordError(f"calibration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"calibration {path}: is not valid JSON ({error})") from error


def parse(document: Any, where: str) -> Calibration:
    """Check the document of a calibration.

    Raises:
        RecordError: It is not a calibration, is damaged, or has another schema version.
    """
    if not isinstance(document, dict) or document.get("kind") != "audit calibration":
        kind = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise RecordError(f"calibration {where}: expected an audit calibration, got {kind!r}")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(
            f"calibration {where}: expected schema version {SCHEMA_VERSION}, got {document.get('schema_version')!r}"
        )
    try:
        thresholds = {
            name: Threshold(
                float(row["centre"]), float(row["threshold"]), int(row["clean"]), bool(row["judges"])
            )
            for name, row in document["checks"].items()
        }
        calibration = Calibration(float(document["level"]), thresholds, document)
        _ = calibration.line
        numbers = [number for each in thresholds.values() for number in (each.centre, each.value)]
        if not 0 < calibration.level < 1 or not all(map(math.isfinite, numbers)):
            raise ValueError("expected a level in (0, 1) and finite thresholds")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordError(f"calibration {where}: is damaged ({type(error).__name__}: {error})") from error
    return calibration
