"""Thresholds from a population of clean and attacked models, and what is known about their errors."""

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

# Mixtures of merged experts have thresholds of their own: they refuse some images by design, for which stamps are found
# as for a backdoor, so that scores that are ordinary for them would be signs in other models.
FILE, MERGED_FILE, SCHEMA_VERSION = "calibration.json", "calibration-merged.json", 1
# Fewer clean models have no spread to speak of.
FEWEST_CLEAN = 5


@dataclass(frozen=True)
class Threshold:
    """The calibrated threshold of one check.

    Attributes:
        centre: Mean score of clean models.
        value: The threshold.
        clean: Number of clean models that it comes from.
        judges: Whether the check counts for the verdict: it told attacked models of the population from clean ones.
    """

    centre: float
    value: float
    clean: int
    judges: bool = True


@dataclass(frozen=True)
class Calibration:
    """A calibration of the checks.

    Attributes:
        level: The false alarm rate of the verdict that the thresholds aim at, in (0, 1).
        thresholds: By name and version of the check, such as "gate-rows/1".
        document: The whole file: the population, when and from which commit it was made, and the measured errors.
    """

    level: float
    thresholds: Mapping[str, Threshold]
    document: Mapping[str, Any]

    def threshold(self, name: str, version: int) -> Threshold | None:
        """Return the threshold of a check; None if it was not calibrated in this version."""
        return self.thresholds.get(key_of(name, version))

    @property
    def line(self) -> str:
        """What the thresholds come from, in one line."""
        population, verdict = self.document["population"], self.document["verdict"]["false_alarms"]
        kinds = dict.fromkeys(row["model"] for row in self.document.get("groups", ()))
        models = f"models ({', '.join(kinds)}; others were not measured)" if kinds else "models"
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
    """Return the key of a check in a calibration: another version of a check needs another threshold."""
    return f"{name}/{version}"


def set_threshold(clean: Sequence[float], level: float) -> Threshold:
    """Set a threshold that the score of a clean model exceeds with a probability of at most `level`.

    It is the upper prediction limit for one more value from a normal distribution; or, if that is larger, the score
    that one more value exceeds with this probability whatever the distribution (`ops.detection.threshold_rank`), which
    is the highest score if there are too few. Whether scores are normal is not known; how often clean models exceed the
    thresholds is therefore measured on models that did not set them.

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
        merged: Whether it is wanted for mixtures of merged experts, or for all other models.
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
        RecordError: It is none, or of another schema version.
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
