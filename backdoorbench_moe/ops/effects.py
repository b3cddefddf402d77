"""Means with their intervals, and how far two groups of values lie apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """The mean of `n` values with its 95% interval `low` to `high` (Student's t).

    value is None of no value; low and high are None of fewer than two.
    """

    value: float | None
    n: int
    low: float | None
    high: float | None


def mean_of(values: Tensor) -> Mean:
    """The mean of (N,) values and its 95% interval; NaN is left out."""
    values = values.double().flatten()
    values = values[~values.isnan()]
    n = len(values)
    if n < 2:
        return Mean(values.item() if n else None, n, None, None)
    value = values.mean().item()
    half = float(stats.t.ppf(0.975, n - 1)) * values.std().item() / math.sqrt(n)
    return Mean(value, n, value - half, value + half)


def means_of(values: Tensor) -> tuple[Mean, ...]:
    """`mean_of` each column of (N, E)."""
    return tuple(mean_of(column) for column in values.unbind(1))


@dataclass(frozen=True)
class Difference:
    """How the values of a first group lie to those of a second.

    n: sizes of both. means: of both. auc: probability that a value of the first is larger than one of the
    second, ties half ("common language effect size"). rank_biserial: 2 auc - 1. cohens_d: difference of the
    means in pooled standard deviations; None where there is no spread. p: two-sided Mann-Whitney U test, with
    correction for ties and continuity.
    """

    n: tuple[int, int]
    means: tuple[float, float]
    auc: float
    rank_biserial: float
    cohens_d: float | None
    p: float


def differences(values: Tensor, groups: Tensor) -> list[Difference | None]:
    """Compare values inside each group with those outside of it; None where one of the two is empty.

    values: (N,) float. groups: (E, N) bool. The values are ranked once for all groups, which is what makes
    this cheaper than as many calls of scipy's `mannwhitneyu`.
    """
    values = values.double().cpu()
    ranks = torch.from_numpy(stats.rankdata(values.numpy()))
    total, ties = len(values), torch.unique(values, return_counts=True)[1].double()
    tied = float((ties.pow(3) - ties).sum())
    return [_difference(values, ranks, group.cpu(), total, tied) for group in groups]


def _difference(values: Tensor, ranks: Tensor, group: Tensor, total: int, tied: float) -> Difference | None:
    first = int(group.sum())
    second = total - first
    if not (first and second):
        return None
    u = ranks[group].sum().item() - first * (first + 1) / 2
    auc = u / (first * second)
    spread = math.sqrt(first * second / 12 * (total + 1 - tied / (total * (total - 1))))
    z = max(0.0, abs(u - first * second / 2) - 0.5) / spread if spread else 0.0
    inside, outside = values[group], values[~group]
    means = inside.mean().item(), outside.mean().item()
    squares = (inside - means[0]).square().sum().item() + (outside - means[1]).square().sum().item()
    deviation = math.sqrt(squares / (total - 2)) if total > 2 else 0.0
    return Difference(
        n=(first, second),
        means=means,
        auc=auc,
        rank_biserial=2 * auc - 1,
        cohens_d=(means[0] - means[1]) / deviation if deviation else None,
        p=2 * float(stats.norm.sf(z)) if z else 1.0,
    )
