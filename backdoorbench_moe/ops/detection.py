"""Detection by scores: the area under the ROC curve, and thresholds for a given false positive rate."""

from __future__ import annotations

import math

import numpy as np

from backdoorbench_moe.ops.intervals import Z
from backdoorbench_moe.ops.metrics import Proportion


def auroc(clean: np.ndarray, triggered: np.ndarray) -> Proportion:
    """Compute the area under the ROC curve (AUROC) with a 95% confidence interval.

    The area is the share of pairs of a triggered and a clean score in which the triggered score is higher; ties count
    half.

    The interval is Newcombe's method 5. Like Wilson's interval for a proportion, it uses the standard error at each
    bound instead of the standard error at the measured area: a bound is an area whose distance from the measured area
    is 1.96 times the bound's standard error, by the formula of Hanley and McNeil. Its width is therefore above 0 even
    for a measured area of 0% or 100%.

    Args:
        clean: (m,) scores of clean images; higher is more suspicious.
        triggered: (n,) scores of triggered images.

    Returns:
        The area and its interval in percent, with m + n as the number of images.

    Raises:
        ValueError: A group is empty.

    Source:
        Newcombe, Statistics in Medicine 25 (2006), 559-573; Hanley and McNeil, Radiology 143 (1982), 29-36.
    """
    m, n = len(clean), len(triggered)
    if not m or not n:
        raise ValueError(f"auroc: expected scores of both groups, got {m} clean and {n} triggered")
    from scipy.stats import rankdata  # 0.7 s, which a run without a detector does not need.

    ranks = rankdata(np.concatenate([triggered, clean]))
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (m * n))
    low, high = _interval(area, m, n)
    return Proportion(100 * area, m + n, 100 * low, 100 * high)


def _interval(area: float, m: int, n: int) -> tuple[float, float]:
    """Return the two areas in [0, 1] whose distance from `area` is 1.96 times their standard error."""
    from scipy.optimize import brentq

    def error(at: float) -> float:
        size = (m + n) / 2 - 1
        return math.sqrt(at * (1 - at) * (1 + size * (1 - at) / (2 - at) + size * at / (1 + at)) / (m * n))

    # 1.96 errors minus the distance is positive at the measured area, where the distance is 0, and negative at 0 or 1,
    # where the error is 0. Hence there is a root in between.
    low = 0.0 if area == 0 else brentq(lambda at: Z * error(at) - (area - at), 0, area - 1e-15)
    high = 1.0 if area == 1 else brentq(lambda at: Z * error(at) - (at - area), area + 1e-15, 1)
    return float(low), float(high)


def threshold_rank(fpr: float, calibrating: int) -> int:
    """Compute the rank k such that the k-th highest of n calibration scores of clean images is used as the threshold.

    A new clean score exceeds the k-th highest of n other clean scores with a probability of k / (n + 1) for any
    continuous distribution of the scores; with a lower one if there are ties.

    Args:
        fpr: Highest false positive rate, in (0, 1).
        calibrating: Number n of scores that the threshold is calibrated on.

    Returns:
        The largest k, 1 to n, for which this probability is at most `fpr`; 0 if n is too small for any k.
    """
    return max(0, min(int(fpr * (calibrating + 1) + 1e-9), calibrating))


def calibrate_threshold(clean: np.ndarray, fpr: float) -> float:
    """Compute a threshold that a new clean score exceeds with a probability of at most `fpr`.

    Args:
        clean: (n,) scores of clean images.
        fpr: Highest false positive rate, in (0, 1).

    Returns:
        The k-th highest score, with k = `threshold_rank(fpr, n)`.

    Raises:
        ValueError: There are too few scores for this rate.
    """
    rank = threshold_rank(fpr, len(clean))
    if not rank:
        raise ValueError(f"calibrate_threshold: expected at least 1 / fpr - 1 scores, got {len(clean)}")
    return float(np.sort(clean)[-rank])
