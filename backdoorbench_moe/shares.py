"""Shares of a whole: how many items a share between 0 and 1 amounts to."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction


def share_of(share: float, total: int) -> int:
    """Return how many of `total` items a share is: floor(share * total), or n if the share is the float of n / total.

    So 0.29 of 100 is 29, and 20 / 39209 of 39209 is 20, although both floats are a little less than the fractions.

    Args:
        share: In [0, 1].
        total: Number of items, from 0.
    """
    exact = Fraction(float(share)) * total
    nearest = round(exact)
    return nearest if total and nearest / total == float(share) else int(exact)


def smallest_share(total: int) -> float:
    """Return a share with few digits that is at least one of `total` items, such as 0.13 of 8.

    Args:
        total: Number of items, from 1.

    Returns:
        1 / total, rounded up to two significant digits; `share_of` it is at least 1.
    """
    return float(Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(total)))
