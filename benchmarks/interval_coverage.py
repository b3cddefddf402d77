"""Simulated coverage of the intervals over seeds: how often a 95% interval contains the true mean.

    python benchmarks/interval_coverage.py [--repeats 4000]

Each seed's true share is drawn from a beta distribution with a given mean and standard deviation. Its errors on the
test images are then drawn in one of two ways:

- independent: the errors of different seeds are independent (binomial counts);
- shared: all seeds share one test set, whose images are misclassified in a fixed order of difficulty, so that two
  seeds with the same true share misclassify the same images.

Real seeds are between the two. The script prints a Markdown table with coverage and median width of
`ops.intervals.seeds_interval` and, for comparison, of Student's t interval. A second table is for differences of two
means: of different models (`difference_interval`), and of the same models before and after a change
(`paired_interval`), whose true shares are the same quantile of both distributions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, t

from backdoorbench_moe.ops.intervals import Interval, difference_interval, paired_interval, seeds_interval

# Mean and standard deviation of the seeds' true shares. In `POLES`, the beta distribution has a pole at 0 or 1: most
# seeds are there, and rare ones far away.
REGULAR = [
    (0.02, 0.0),
    (0.02, 0.01),
    (0.5, 0.0),
    (0.5, 0.05),
    (0.5, 0.15),
    (0.9, 0.0),
    (0.9, 0.02),
    (0.9, 0.05),
    (0.99, 0.0),
    (0.99, 0.002),
    (0.99, 0.01),
    (0.999, 0.0),
    (0.999, 0.001),
    (1.0, 0.0),
]
POLES = [(0.02, 0.05), (0.9, 0.1), (0.9, 0.15), (0.99, 0.03), (0.999, 0.005)]
IMAGES, SEEDS = (1800, 9000), (3, 5, 10)
DIFFERENCES = [
    ((0.5, 0.05), (0.6, 0.05)),
    ((0.65, 0.01), (0.66, 0.01)),
    ((0.9, 0.05), (0.99, 0.002)),
    ((1.0, 0.0), (0.99, 0.002)),
    ((1.0, 0.0), (1.0, 0.0)),
    ((0.9, 0.15), (0.9, 0.15)),
    ((0.99, 0.03), (0.9, 0.1)),
]

Method = Callable[[list[float], int], Interval | None]


@dataclass(frozen=True)
class Coverage:
    """Share of intervals that contain the true value, and their median width, both in percent."""

    share: float
    width: float


def draw(
    mean: float, std: float, images: int, seeds: int, repeats: int, *, shared: bool, rng: np.random.Generator
) -> np.ndarray:
    """Draw measured shares in percent, (repeats, seeds)."""
    truth = _true_shares(mean, std, rng.random((repeats, seeds)))
    if not shared:
        return 100 * rng.binomial(images, truth) / images
    return _on_shared_images(truth, np.sort(rng.random((repeats, images))))


def draw_pairs(
    a: tuple[float, float],
    b: tuple[float, float],
    images: int,
    seeds: int,
    repeats: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Draw measured shares of the same models before and after a change, in percent, (repeats, seeds) each."""
    quantiles, difficulty = rng.random((repeats, seeds)), np.sort(rng.random((repeats, images)))
    return [_on_shared_images(_true_shares(*side, quantiles), difficulty) for side in (a, b)]


def _on_shared_images(truth: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
    """Measure true shares (repeats, seeds) on the images of each repeat, (repeats, images), in order of difficulty."""
    rows = zip(difficulty, truth, strict=True)
    return 100 * np.array([np.searchsorted(row, shares) for row, shares in rows]) / difficulty.shape[1]


def _true_shares(mean: float, std: float, quantiles: np.ndarray) -> np.ndarray:
    if std == 0:
        return np.full(quantiles.shape, mean)
    concentration = mean * (1 - mean) / std**2 - 1
    return beta.ppf(quantiles, mean * concentration, (1 - mean) * concentration)


def simulate(
    mean: float,
    std: float,
    images: int,
    seeds: int,
    *,
    shared: bool,
    repeats: int,
    rng: np.random.Generator,
    method: Method = seeds_interval,
) -> Coverage:
    """Simulate the coverage of a mean over seeds."""
    found = draw(mean, std, images, seeds, repeats, shared=shared, rng=rng)
    intervals = [method(values.tolist(), images) for values in found]
    return _coverage(intervals, 100 * mean)


def simulate_difference(
    a: tuple[float, float],
    b: tuple[float, float],
    images: int,
    seeds: int,
    *,
    repeats: int,
    rng: np.random.Generator,
) -> Coverage:
    """Simulate the coverage of the difference of two means, over independent images."""
    sides = [draw(*side, images, seeds, repeats, shared=False, rng=rng) for side in (a, b)]
    intervals = []
    for x, y in zip(*sides, strict=True):
        ends = [seeds_interval(values.tolist(), images) for values in (x, y)]
        intervals.append(difference_interval(float(x.mean()), ends[0], float(y.mean()), ends[1]))
    return _coverage(intervals, 100 * (b[0] - a[0]))


def simulate_pairs(
    a: tuple[float, float],
    b: tuple[float, float],
    images: int,
    seeds: int,
    *,
    repeats: int,
    rng: np.random.Generator,
) -> Coverage:
    """Simulate the coverage of the mean difference of the same models before and after a change."""
    sides = draw_pairs(a, b, images, seeds, repeats, rng)
    intervals = [paired_interval(x.tolist(), y.tolist(), images) for x, y in zip(*sides, strict=True)]
    return _coverage(intervals, 100 * (b[0] - a[0]))


def _coverage(intervals: list[Interval | None], truth: float) -> Coverage:
    ends = np.array([interval for interval in intervals if interval is not None])
    low, high = ends[:, 0], ends[:, 1]
    # Bounds equal to the true value may differ from it in the last bit.
    held = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
    return Coverage(100 * float(held.mean()), float(np.median(high - low)))


def student_interval(values: list[float], images: int) -> Interval:
    """Compute Student's t interval of the mean, which ignores the number of images."""
    count = len(values)
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / count**0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=4000, help="simulated experiments per cell")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    print("| mean % | std | images | seeds | independent | width | shared | width | Student's t, shared |")
    print("| --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    for mean, std in REGULAR + POLES:
        for images in IMAGES:
            for seeds in SEEDS:
                found = [
                    simulate(mean, std, images, seeds, shared=shared, repeats=repeats, rng=rng, method=method)
                    for shared, repeats, method in (
                        (False, options.repeats, seeds_interval),
                        (True, options.repeats, seeds_interval),
                        (True, options.repeats // 4, student_interval),
                    )
                ]
                texts = [f"{one.share:.1f} | {one.width:.2f}" for one in found[:2]]
                row = [f"{100 * mean:g}", f"{100 * std:g}", str(images), str(seeds), *texts]
                print(f"| {' | '.join(row)} | {found[2].share:.1f} |")
    print(
        "\n| A: mean %, std | B: mean %, std | images | seeds | other models | width | same models | width |"
    )
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for a, b in DIFFERENCES:
        for images in IMAGES:
            for seeds in SEEDS:
                row = [f"{100 * mean:g}, {100 * std:g}" for mean, std in (a, b)] + [str(images), str(seeds)]
                for simulation in (simulate_difference, simulate_pairs):
                    one = simulation(a, b, images, seeds, repeats=options.repeats, rng=rng)
                    row += [f"{one.share:.1f}", f"{one.width:.2f}"]
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
