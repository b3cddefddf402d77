"""Statistics of one metric over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backdoorbench_moe.metrics import METRICS, PERCENT, Metric
from backdoorbench_moe.ops.intervals import (
    FEWEST_SEEDS,
    Interval,
    difference_interval,
    paired_interval,
    seeds_interval,
)
from backdoorbench_moe.ops.metrics import mean_std

# Equal shares of different counts may differ in the last bit.
LAST_BIT = 1e-9
# Relative to another accuracy, so they can exceed 100%; intervals of shares do not apply to them.
RATIOS = ("overall",)


@dataclass(frozen=True)
class Sample:
    """One metric of several runs that differ in their seed.

    Attributes:
        values: The values, in the metric's unit.
        images: Number of images on which each value was measured; 0 for a metric that is not a share of images.
    """

    values: tuple[float, ...]
    images: int

    def interval(self, metric: Metric) -> Interval | None:
        """Compute the 95% interval of the mean (see `ops.intervals`).

        Returns:
            Low and high end; None for fewer than three seeds, for metrics that are not shares of images, and for ratios
            of two accuracies.
        """
        return seeds_interval(self.values, self.images) if self.is_of_images(metric) else None

    def is_of_images(self, metric: Metric) -> bool:
        """Return whether the metric is a share of images, to which the intervals apply."""
        return metric.base not in RATIOS and metric.unit == PERCENT and self.images > 0


def drop_interval(ba: Sample, twin_ba: Sample) -> Interval | None:
    """Compute the 95% interval of the mean clean accuracy drop, the twin's mean BA minus the mean BA.

    Returns:
        Low and high end in percentage points; None for fewer than three seeds.
    """
    (mean, interval), (twin_mean, twin_interval) = (
        (mean_std(sample.values)[0], sample.interval(METRICS["ba"])) for sample in (ba, twin_ba)
    )
    return difference_interval(mean, interval, twin_mean, twin_interval)


def compared_interval(a: Statistic, b: Statistic, *, paired: bool) -> Interval | None:
    """Compute the 95% interval of the difference of two means, B minus A.

    Args:
        a: The first side.
        b: The second side.
        paired: Whether both are of the same trained models. If they also have the same seeds, `paired_interval` is
            used, and `difference_interval` otherwise.

    Returns:
        Low and high end; None if a side has fewer than three seeds, or the metric is not a share of images.
    """
    if paired and a.seeds == b.seeds and a.images and b.images:
        return paired_interval(a.values, b.values, min(a.images, b.images))
    return difference_interval(a.mean, a.interval, b.mean, b.interval)


def interval_of(values: Sequence[Mapping[str, float]], over_seeds: Interval | None) -> Interval | None:
    """Choose the 95% interval of a mean over seeds.

    Args:
        values: For each seed "value" and, if it has an interval over the test images, "low" and "high".
        over_seeds: The interval of the mean over seeds, which requires at least three of them.

    Returns:
        The interval over seeds. With fewer than three seeds, the range from the lowest to the highest end of the
        intervals of single seeds: it is wider than the mean's interval over test images, but does not account for the
        variation between seeds. None if a seed has no interval, or if there are at least three
        seeds without an interval of their mean.
    """
    if over_seeds is not None:
        return over_seeds
    if not values or len(values) >= FEWEST_SEEDS:
        return None
    if any("low" not in value or "high" not in value for value in values):
        return None
    return min(value["low"] for value in values), max(value["high"] for value in values)


@dataclass(frozen=True)
class Statistic:
    """One metric of one cell over its seeds, with the published value.

    Args:
        seeds: Seeds of the finished runs that have the metric.
        values: Their values, in the metric's unit.
        mean: Mean of the values.
        std: Sample standard deviation; None for a single seed.
        interval: 95% interval of the mean over seeds (see `ops.intervals`); None for fewer than three seeds and for
            metrics that are not shares of images.
        paper: Published mean; None if there is none.
        rounding: Half a unit of the last published digit.
        near_chance: Number of seeds whose model is near chance (see `backdoorbench_moe.collapse`).
        shown: The interval shown below the mean; see `interval_of`.
        images: Number of images that determines the uncertainty of each value; 0 for a metric that is not a share of
            images.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None
    interval: Interval | None = None
    paper: float | None = None
    rounding: float = 0.0
    near_chance: int = 0
    shown: Interval | None = None
    images: int = 0

    @classmethod
    def of(
        cls,
        values: Mapping[int, float],
        interval: Interval | None = None,
        paper: float | None = None,
        rounding: float = 0.0,
        near_chance: int = 0,
        shown: Interval | None = None,
        images: int = 0,
    ) -> Statistic:
        """Compute the mean and standard deviation of at least one value, given by seed."""
        seeds, found = tuple(values), tuple(values.values())
        mean, std = mean_std(found)
        return cls(seeds, found, mean, std, interval, paper, rounding, near_chance, shown, images)

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def low(self) -> float | None:
        """Low end of the interval."""
        return None if self.interval is None else self.interval[0]

    @property
    def high(self) -> float | None:
        """High end of the interval."""
        return None if self.interval is None else self.interval[1]

    @property
    def difference(self) -> float | None:
        """Mean minus the published value."""
        return None if self.paper is None else self.mean - self.paper

    @property
    def inside(self) -> bool | None:
        """Whether the published value lies inside the interval, allowing for its rounding.

        None without a published value or an interval. Apart from its rounding, the published value is taken as exact,
        since its variation over seeds is unknown.
        """
        if self.paper is None or self.interval is None:
            return None
        margin = self.rounding + LAST_BIT
        return self.interval[0] - margin <= self.paper <= self.interval[1] + margin
