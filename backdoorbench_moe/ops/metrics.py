"""Shares with their uncertainty, and means over repeats."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, t


@dataclass(frozen=True)
class Proportion:
    """A share in percent: `value` of `n` evaluated, with its Wilson 95% interval `low` to `high`."""

    value: float
    n: int
    low: float
    high: float


def proportion(hits: int, n: int) -> Proportion:
    """Compute the share of `hits` in `n`, in percent, with the Wilson 95% interval.

    Raises ValueError unless 0 <= hits <= n and n > 0.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"proportion: expected 0 <= hits <= n and n > 0, got {hits} of {n}")
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Proportion(100 * hits / n, n, 100 * float(interval.low), 100 * float(interval.high))


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute mean and sample standard deviation (n - 1); None for the deviation of a single value.

    Raises ValueError if there are no values.
    """
    if not values:
        raise ValueError("mean_std: expected at least one value, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Compute the interval of the mean of a normal population (Student's t); None, None for a single value.

    Raises ValueError if there are no values.
    """
    mean, std = mean_std(values)
    if std is None:
        return None, None
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * std / len(values) ** 0.5
    return mean - half, mean + half
