"""How well scores tell two groups apart, and thresholds that rarely call a clean one suspicious."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from backdoorbench_moe.ops.metrics import Proportion


def auroc(clean: np.ndarray, triggered: np.ndarray) -> Proportion:
    """Area under the ROC curve in percent: how often a triggered score exceeds a clean one, ties counting half.

    clean (m,), triggered (n,): scores, higher is more suspicious. The 95% interval is method 5 of Newcombe
    (Statistics in Medicine 25, 2006, part 2): Hanley and McNeil's standard error (Radiology 143, 1982) at the
    bound itself, as Wilson's does for a share; so it is none of width zero at 0 or 100%. n is m + n. Raises
    ValueError if a group is empty.
    """
    m, n = len(clean), len(triggered)
    if not m or not n:
        raise ValueError(f"auroc: expected scores of both groups, got {m} clean and {n} triggered")
    ranks = rankdata(np.concatenate([triggered, clean]))
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (m * n))
    low, high = _interval(area, m, n)
    return Proportion(100 * area, m + n, 100 * low, 100 * high)


def _interval(area: float, m: int, n: int) -> tuple[float, float]:
    """The two areas that lie 1.96 of their own standard errors from the one measured."""
    z = float(norm.ppf(0.975))

    def error(at: float) -> float:
        size = (m + n) / 2 - 1
        return math.sqrt(at * (1 - at) * (1 + size * (1 - at) / (2 - at) + size * at / (1 + at)) / (m * n))

    # At the measured area the difference is negative, at the far end positive: one root lies between.
    low = 0.0 if area == 0 else brentq(lambda at: z * error(at) - (area - at), 0, area - 1e-15)
    high = 1.0 if area == 1 else brentq(lambda at: z * error(at) - (at - area), area + 1e-15, 1)
    return float(low), float(high)


def alarms(fpr: float, calibrating: int) -> int:
    """k, so that a clean score lies above the k-th highest of `calibrating` other clean ones with chance <= fpr.

    That chance is k / (calibrating + 1), whatever the scores' distribution, and less where some are equal; 0
    where there are too few.
    """
    return max(0, min(int(fpr * (calibrating + 1) + 1e-9), calibrating))


def calibrate_threshold(clean: np.ndarray, fpr: float) -> float:
    """The k-th highest of (n,) clean scores, k = `alarms(fpr, n)`; a score above it is suspicious.

    Raises ValueError for too few scores.
    """
    count = alarms(fpr, len(clean))
    if not count:
        raise ValueError(f"calibrate_threshold: expected at least 1 / fpr - 1 scores, got {len(clean)}")
    return float(np.sort(clean)[-count])
