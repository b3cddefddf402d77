"""Confidence intervals of means over seeds and of their differences, on the scale from 0 to 100%.

Student's t interval of the values of all seeds is not used, for three reasons: it exceeds the scale (27.8 ± 20.1 over
two seeds gives -153 to 209%), its width is 0 if all seeds agree (100, 100, 100), and it ignores that each value is a
count over the same test images. `benchmarks/interval_coverage.py` simulates how often each of the two intervals
contains the true mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

# With fewer seeds, the standard deviation between them cannot be estimated well enough.
FEWEST_SEEDS = 3
# A share may exceed the scale by this much, such as sums of gates that were rounded to float32.
ROUNDING = 1e-3

# Quantile of the normal distribution for a 95% interval.
Z = statistics.NormalDist().inv_cdf(0.975)

Interval = tuple[float, float]


def seeds_interval(values: Sequence[float], images: int) -> Interval | None:
    """Compute the 95% interval of a mean share over seeds.

    There are two sources of uncertainty: the choice of the seeds and the choice of the test images. The variance of
    the mean p of k seeds is estimated as s²/k + p(1 - p)/n, where s is the standard deviation between seeds. The
    number of images is n and not k n, because all seeds are tested on the same images: an unusually easy test set is
    easy for all of them. (If images and seeds were independent, s would already contain the variance of the images,
    and the interval would be slightly too wide.) As s is estimated with k - 1 degrees of freedom, s²/k is multiplied
    by (t/z)², the squared ratio of the quantiles of Student's t and of the normal distribution. The number of images
    of a simple random sample with the same variance, the effective sample size, is then used in Wilson's interval.

    The interval lies within 0 and 100. If all seeds have 0% or all have 100%, it is Wilson's interval of a single
    run, which is also its limit for many seeds that agree.

    In a simulation with 3, 5 and 10 seeds (`benchmarks/results/interval-coverage`), the interval covers the true mean
    in at least 93% of cases if most seeds lie near the mean, that is, if the beta distribution of the true shares has
    no pole at 0 or 1. Coverage is lower if the mean depends on rare seeds that lie far from the others, because a few
    seeds often include none of them: it is 87 to 92% for a mean of 90% and a standard deviation of 15 points, 73 to
    84% for 2 ± 5, 65 to 81% for 99 ± 3, and 45 to 66% for 99.9 ± 0.5 with 9,000 images.

    Args:
        values: The share of each seed, in percent.
        images: Number of test images of each seed.

    Returns:
        Low and high end in percent; None if there are fewer than `FEWEST_SEEDS` seeds.

    Raises:
        ValueError: A value is outside 0 to 100, or there are no images.

    Source:
        Effective sample size and enlarged variance: Korn and Graubard, Survey Methodology 24 (1998),
        193-201, with seeds as the clusters of the survey. With Wilson's interval in the place of
        Clopper and Pearson's: Franco et al., Journal of Survey Statistics and Methodology 7 (2019),
        334-364.
    """
    if images < 1 or not all(-ROUNDING <= value <= 100 + ROUNDING for value in values):
        raise ValueError(f"seeds_interval: expected 0 to 100% of at least 1 image, got {values} of {images}")
    values = [min(max(value, 0.0), 100.0) for value in values]
    count = len(values)
    if count < FEWEST_SEEDS:
        return None
    share = statistics.fmean(values) / 100
    between = statistics.variance(values) / 100**2 / count * _enlargement(count - 1)
    single = share * (1 - share)
    # At 0 and 100% all seeds agree, and the ratio would be 0 / 0.
    effective = images if single == 0 else single / (between + single / images)
    return wilson_interval(share, effective)


@cache
def _enlargement(freedom: int) -> float:
    """(t/z)², the factor for a variance that is estimated with few degrees of freedom."""
    from scipy.special import stdtrit  # 0.2 s, which a run does not need.

    return float(stdtrit(freedom, 0.975) / Z) ** 2


def wilson_interval(share: float, count: float) -> Interval:
    """Compute Wilson's 95% interval of a share of images.

    Args:
        share: The share, in [0, 1].
        count: Number of images; it need not be an integer (see `seeds_interval`).

    Returns:
        Low and high end in percent.

    Source:
        Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    # A bound of exactly 0 or 100 must not change by rounding.
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return 100 * low, 100 * high


def difference_interval(
    a: float, a_interval: Interval | None, b: float, b_interval: Interval | None
) -> Interval | None:
    """Compute the 95% interval of the difference b - a of two means from the intervals of both.

    The squared distances between the means and their bounds are added (method of variance estimates recovery). The
    interval stays on the scale from -100 to 100, and its width is not zero if both means are 0 or 100%. The means are
    assumed to be independent. If both share seeds or test images, they are usually positively correlated, and the
    interval is too wide; if both are of the same trained models, use `paired_interval`.

    Args:
        a: First mean.
        a_interval: Its 95% interval, or None if it has none.
        b: Second mean, in the same unit.
        b_interval: Its 95% interval, or None if it has none.

    Returns:
        Low and high end of b - a; None if one of the means has no interval.

    Source:
        Zou and Donner, Statistics in Medicine 27 (2008), 1693-1702; for two Wilson intervals it is
        method 10 of Newcombe, Statistics in Medicine 17 (1998), 873-890.
    """
    if a_interval is None or b_interval is None:
        return None
    below, above = _distances(a, a_interval, b, b_interval)
    return b - a - below, b - a + above


def _distances(a: float, a_interval: Interval, b: float, b_interval: Interval) -> tuple[float, float]:
    """Return how far the bounds of a difference b - a lie below and above it, for independent means."""
    (a_low, a_high), (b_low, b_high) = a_interval, b_interval
    return math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)


def paired_interval(a: Sequence[float], b: Sequence[float], images: int) -> Interval | None:
    """Compute the 95% interval of the mean difference b - a of two shares of the same models, such as after defenses.

    What the models have in common, such as an attack that succeeded better with one seed than with another, cancels in
    the difference of each seed. The squared distance of each bound from the mean difference is the sum of two:

    - seeds: (t s)²/k, where s is the standard deviation of the differences of k seeds, and t the quantile of Student's
      t with k - 1 degrees of freedom;
    - images: as in `difference_interval`, with Wilson's intervals of both means for the number of images. That both are
      measured on the same images is not used, since records do not say on which images they differ, so this part is
      rather too wide.

    In a simulation with 3, 5 and 10 seeds (`benchmarks/results/interval-coverage`), it covers the true difference in at
    least 93% of cases, and in 88 to 94% if a mean of 99 ± 3% changes to 90 ± 10%.

    Args:
        a: First share of each seed, in percent.
        b: Second share of the same seeds, in the same order.
        images: Number of test images of each seed.

    Returns:
        Low and high end of b - a; None if there are fewer than `FEWEST_SEEDS` seeds.

    Raises:
        ValueError: The sides have different numbers of seeds.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_interval: expected as many seeds on both sides, got {len(a)} and {len(b)}")
    count = len(a)
    if count < FEWEST_SEEDS:
        return None
    means = statistics.fmean(a), statistics.fmean(b)
    ends = [wilson_interval(min(max(mean / 100, 0.0), 1.0), images) for mean in means]
    below, above = _distances(means[0], ends[0], means[1], ends[1])
    differences = [after - before for before, after in zip(a, b, strict=True)]
    seeds = Z * math.sqrt(_enlargement(count - 1) * statistics.variance(differences) / count)
    middle = means[1] - means[0]
    return max(-100.0, middle - math.hypot(below, seeds)), min(100.0, middle + math.hypot(above, seeds))
