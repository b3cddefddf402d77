"""Finds which of several siblings, such as the experts of a layer, is an outlier in a positive quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import norm
from torch import Tensor

from backdoorbench_moe.ops.outliers import studentised

Direction = Literal["up", "down", "both"]
# With fewer siblings, the spread cannot be estimated.
FEWEST = 3
# A sibling within 5% of the others is no outlier, even if the others are nearly equal.
SMALLEST_RATIO = 1.05


@dataclass(frozen=True)
class Standout:
    """The sibling that stands out most.

    Attributes:
        name: Name of the sibling.
        quantity: Name of the quantity.
        ratio: Its value, divided by the geometric mean of the others.
        surprise: -log10 of the probability that any of the compared values would be this far from its siblings by
            chance, if their logarithms had one normal distribution; 0 if nothing stands out.
    """

    name: str
    quantity: str
    ratio: float
    surprise: float


def find_standout(
    quantities: Mapping[str, Mapping[str, float]], *, direction: Direction = "both"
) -> tuple[Standout, dict[str, float]]:
    """Find the sibling that stands out most.

    Each value is compared with those of the same quantity by a t test of its logarithm (`ops.outliers.studentised`).
    The p-values are multiplied by the number of values (Bonferroni correction). The result does not depend on the order
    of the siblings or on a common factor of a quantity.

    Args:
        quantities: The values, at least 0, by quantity and name of the sibling. Quantities with fewer than `FEWEST`
            siblings, or whose values are all 0, are left out.
        direction: Whether siblings with larger values than the others count ("up"), smaller ones ("down"), or both.

    Returns:
        The standout, and the largest surprise of each sibling.

    Raises:
        ValueError: No quantity is left.

    Source:
        Grubbs, Technometrics 11 (1969), for the test of one outlier.
    """
    groups = {
        name: values
        for name, values in quantities.items()
        if len(values) >= FEWEST and max(values.values()) > 0
    }
    if not groups:
        raise ValueError(f"find_standout: expected {FEWEST} siblings")
    count = sum(map(len, groups.values()))
    found = [
        Standout(name, quantity, ratio, surprise)
        for quantity, values in groups.items()
        for name, ratio, surprise in zip(
            values, *_compare(list(values.values()), count, direction), strict=True
        )
    ]
    by_name: dict[str, float] = {}
    for each in found:
        by_name[each.name] = max(by_name.get(each.name, 0.0), each.surprise)
    return max(found, key=lambda each: each.surprise), by_name


def surprise_of(tail: float, count: int) -> float:
    """Return -log10 of a p-value multiplied by the number of comparisons, at least 0."""
    return max(0.0, -math.log10(min(1.0, max(tail * count, 1e-300))))


def _compare(values: list[float], count: int, direction: Direction) -> tuple[list[float], list[float]]:
    """Return the ratios and surprises of the values of one quantity."""
    numbers = torch.tensor(values, dtype=torch.float64)
    # A value of 0, such as that of a muted expert, counts as a millionth of the largest.
    logs = numbers.clamp(min=1e-6 * numbers.max().item()).log()
    others = (logs.sum() - logs) / (len(logs) - 1)
    apart = logs - others
    sides = 2 if direction == "both" else 1
    surprises = [surprise_of(sides * float(norm.sf(abs(z))), count) for z in studentised(logs).tolist()]
    wanted = {"up": apart, "down": -apart, "both": apart.abs()}[direction]
    far = (wanted > math.log(SMALLEST_RATIO)).tolist()
    return apart.exp().tolist(), [s if f else 0.0 for s, f in zip(surprises, far, strict=True)]


def matrices_of(state: Mapping[str, Tensor], rows: Mapping[str, tuple[int, int]]) -> list[Tensor]:
    """Return the weight matrices of an expert, (rows, columns) float64, in the order of its tensors.

    Args:
        state: The state dict.
        rows: The rows of the expert, as in `Expert.own`. Tensors of one dimension are left out.
    """
    parts = [state[name][start:stop] for name, (start, stop) in rows.items()]
    return [part.detach().double().flatten(1).cpu() for part in parts if part.ndim > 1]
