"""Shares with confidence intervals, means over seeds, and a test of whether an accuracy is near chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backdoorbench_moe.ops.intervals import wilson_interval

if TYPE_CHECKING:
    from torch import Tensor

# A model whose accuracy is known to be below both limits has learned next to nothing.
CHANCE_FACTOR, CHANCE_SKILL = 2.0, 0.1


@dataclass(frozen=True)
class Proportion:
    """A share of images in percent.

    Attributes:
        value: The share, in percent.
        n: Number of images it was measured on.
        low: Low end of its Wilson 95% interval, in percent.
        high: High end of the interval, in percent.
    """

    value: float
    n: int
    low: float
    high: float


def proportion(hits: int, n: int) -> Proportion:
    """Compute the share of `hits` in `n`, in percent, with the Wilson 95% interval.

    Raises:
        ValueError: Unless 0 <= hits <= n and n > 0.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"proportion: expected 0 <= hits <= n and n > 0, got {hits} of {n}")
    return Proportion(100 * hits / n, n, *wilson_interval(hits / n, n))


def proportion_of(hits: Tensor) -> Proportion:
    """Compute the share of True in a bool tensor (n,), in percent, with the Wilson 95% interval.

    Raises:
        ValueError: If n is 0.
    """
    return proportion(int(hits.sum()), len(hits))


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute mean and sample standard deviation (with n - 1), which is None for a single value.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("mean_std: expected at least one value, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def chance_rate(counts: Sequence[int]) -> float:
    """Compute the accuracy of a model that always predicts the most frequent class, in (0, 1].

    If classes are unbalanced, it is more than 1 / classes: 5.9% on GTSRB's test images of 43 classes.

    Args:
        counts: Number of test images of each class.

    Raises:
        ValueError: If there are no images, or a count is negative.
    """
    if not counts or min(counts) < 0 or not sum(counts):
        raise ValueError(f"chance_rate: expected counts of at least one image, got {list(counts)}")
    return max(counts) / sum(counts)


def near_chance(hits: int, n: int, chance: float) -> bool:
    """Decide whether an accuracy is near chance, from its Wilson 95% interval.

    It is near chance if one of two conditions holds:

    - The interval contains chance or lies below it: the model may be one that always predicts the same class.
    - The whole interval lies below `min(2 c, c + 0.1 (1 - c))`, where c is the chance: the model is better than
      chance, but by less than a factor of two and by less than a tenth of the distance from chance to 100%. The first
      limit is the lower one if there are many classes (2% for 100 balanced classes), the second one if there are few
      (55% for two).

    The interval is used so that the decision does not depend on a few images that are predicted correctly by chance.

    Args:
        hits: Number of test images whose class is predicted correctly.
        n: Number of test images.
        chance: Accuracy of always predicting the most frequent class (see `chance_rate`), in (0, 1].

    Raises:
        ValueError: If the counts are impossible or the chance is not in (0, 1].
    """
    if not 0 < chance <= 1:
        raise ValueError(f"near_chance: expected a chance in (0, 1], got {chance}")
    accuracy = proportion(hits, n)
    limit = min(CHANCE_FACTOR * chance, chance + CHANCE_SKILL * (1 - chance))
    return accuracy.low <= 100 * chance or accuracy.high < 100 * limit
