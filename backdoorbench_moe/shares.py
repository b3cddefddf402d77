"""Conversion between shares in [0, 1] and numbers of items."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction


def share_of(share: float, total: int) -> int:
    """Return the number of items in a share: floor(share * total), or n if `share` is the float nearest to n / total.

    For example, 0.29 of 100 is 29, and 20 / 39209 of 39209 is 20, although both floats are slightly below the
    fractions.

    Args:
        share: A number in [0, 1].
        total: Number of items, from 0.
    """
    exact = Fraction(float(share)) * total
    nearest = round(exact)
    return nearest if total and nearest / total == float(share) else int(exact)


def smallest_share(total: int) -> float:
    """Return a share with few digits that amounts to at least one of `total` items, such as 0.13 for 8.

    Args:
        total: Number of items, from 1.

    Returns:
        1 / total, rounded up to two significant digits; `share_of` returns at least 1 for it.
    """
    return float(Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(total)))
