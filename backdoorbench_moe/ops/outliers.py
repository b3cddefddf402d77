"""Outliers among few values: distances from the mean or the median, in standard deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import ndtri, stdtr
from torch import Tensor

# Largest value that `studentised` returns. The normal distribution's tail beyond it is below the smallest float.
MOST = 37.0
# Factors from the median, or mean, absolute deviation to the standard deviation of a normal distribution.
MEDIAN_SCALE, MEAN_SCALE = 1.4826, 1.253314


def deviations(values: Tensor) -> Tensor:
    """Return the distance of each value from the mean, in unbiased standard deviations.

    Args:
        values: (n,) floats.

    Returns:
        (n,) float64; zeros if all values are equal, or if there is only one.
    """
    values = values.double()
    if len(values) < 2 or (spread := values.std()) <= 1e-12 * values.abs().max():
        return torch.zeros_like(values)
    return (values - values.mean()) / spread


def largest_deviation(count: int) -> float:
    """Return (n - 1) / sqrt(n), the largest result of `deviations` that one of n values can have.

    It is above 3 only for n >= 11: of fewer values, none can be more than 3 standard deviations above the mean.

    Source:
        Shiffler, "Maximum z scores and outliers", The American Statistician 42 (1988).
    """
    return (count - 1) / math.sqrt(count)


def studentised(values: Tensor) -> Tensor:
    """Return the distance of each value from the mean of the others, in standard deviations of a normal distribution.

    Unlike `deviations`, it is not bounded for few values. The distance is divided by the standard error from the other
    values, which gives a t statistic with n - 2 degrees of freedom. This is converted to the number of standard
    deviations that a normal variable exceeds with the same probability.

    Args:
        values: (n,) floats.

    Returns:
        (n,) float64 in [-37, 37]; zeros if there are fewer than three values.

    Source:
        The externally studentised residual, as in Grubbs' test for outliers: Grubbs, Technometrics 11 (1969).
    """
    values, count = values.double(), len(values)
    if count < 3:
        return torch.zeros_like(values)
    others = values.expand(count, count)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    spread, mean = torch.std_mean(others, dim=1)
    distance = values - mean
    noise = 1e-12 * values.abs().max()
    spread = spread.clamp(min=torch.finfo(torch.float64).tiny)
    statistic = torch.where(
        distance.abs() <= noise, 0.0, distance / (spread * math.sqrt(1 + 1 / (count - 1)))
    )
    # The smaller tail is more accurate.
    tails = stdtr(count - 2, -statistic.abs().numpy())
    found = torch.from_numpy(-ndtri(tails)).clamp(max=MOST)
    return found * statistic.sign()


def anomaly_indices(values: Sequence[float]) -> np.ndarray:
    """Compute how many robust standard deviations each value lies below the median.

    The median of an even count is the mean of the two middle values. The standard deviation is estimated as 1.4826
    times the median absolute deviation (MAD). If the MAD is 0, because more than half of the values are equal, 1.253314
    times the mean absolute deviation from the median replaces it, as in Iglewicz and Hoaglin. If all values are equal,
    all indices are 0.

    Args:
        values: Finite numbers, at least one.

    Returns:
        (n,) float64, positive for values below the median. The anomaly index of Neural Cleanse is the absolute value.

    Raises:
        ValueError: There are no values, or one of them is not finite.

    Source:
        Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV-B; Iglewicz and Hoaglin, "How to Detect and Handle
        Outliers", 1993.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"anomaly_indices: expected finite numbers, at least one, got {list(values)}")
    below = np.median(numbers) - numbers
    apart = np.abs(below)
    scale = MEDIAN_SCALE * np.median(apart) or MEAN_SCALE * np.mean(apart)
    return below / scale if scale else below
