"""Detection by scores: the area under the ROC curve, and thresholds of a given false positive rate."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from backdoorbench_moe.ops.metrics import Proportion


def auroc(clean: np.ndarray, triggered: np.ndarray) -> Proportion:
    """Compute the area under the ROC curve: how often a triggered score exceeds a clean one; ties count half.

    The 95% interval is Newcombe's method 5: the bounds are the areas from which the measured one lies 1.96 standard
    errors away, with the standard error of Hanley and McNeil at the bound, as in Wilson's interval of a share. Its
    width is therefore not zero at 0% or 100%.

    Args:
        clean: (m,) scores; higher is more suspicious.
        triggered: (n,) scores.

    Returns:
        The area in percent and its interval, with m + n as the number of images.

    Raises:
        ValueError: A group is empty.

    Source:
        Newcombe, Statistics in Medicine 25 (2006), 559-573; Hanley and McNeil, Radiology 143 (1982), 29-36.
    """
    m, n = len(clean), len(triggered)
    if not m or not n:
        raise ValueError(f"auroc: expected scores of both groups, got {m} clean and {n} triggered")
    ranks = rankdata(np.concatenate([triggered, clean]))
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (m * n))
    low, high = _interval(area, m, n)
    return Proportion(100 * area, m + n, 100 * low, 100 * high)


def _interval(area: float, m: int, n: int) -> tuple[float, float]:
    """The two areas that lie 1.96 of their own standard errors away from the measured one."""
    z = float(norm.ppf(0.975))

    def error(at: float) -> float:
        size = (m + n) / 2 - 1
        return math.sqrt(at * (1 - at) * (1 + size * (1 - at) / (2 - at) + size * at / (1 + at)) / (m * n))

    # The difference is negative at the measured area and positive at the far end, so there is a root between them.
    low = 0.0 if area == 0 else brentq(lambda at: z * error(at) - (area - at), 0, area - 1e-15)
    high = 1.0 if area == 1 else brentq(lambda at: z * error(at) - (at - area), area + 1e-15, 1)
    return float(low), float(high)


def alarms(fpr: float, calibrating: int) -> int:
    """Compute how many clean scores may lie above a threshold that is calibrated on clean scores.

    A new clean score lies above the k-th highest of n other clean scores with a chance of k / (n + 1), whatever the
    distribution of the scores, or less if some are equal.

    Args:
        fpr: Highest false positive rate, in (0, 1).
        calibrating: n, the number of scores that the threshold is calibrated on.

    Returns:
        The largest k of which the chance is at most `fpr`; 0 if n is too small for any.
    """
    return max(0, min(int(fpr * (calibrating + 1) + 1e-9), calibrating))


def calibrate_threshold(clean: np.ndarray, fpr: float) -> float:
    """Set a threshold so that a clean score lies above it with a chance of at most `fpr`.

    Args:
        clean: (n,) scores of clean images.
        fpr: Highest false positive rate, in (0, 1).

    Returns:
        The k-th highest score, with k = `alarms(fpr, n)`.

    Raises:
        ValueError: There are too few scores for this rate.
    """
    count = alarms(fpr, len(clean))
    if not count:
        raise ValueError(f"calibrate_threshold: expected at least 1 / fpr - 1 scores, got {len(clean)}")
    return float(np.sort(clean)[-count])
