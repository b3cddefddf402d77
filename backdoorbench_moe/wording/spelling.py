"""Which known names a misspelt one may have meant."""

from __future__ import annotations

from collections.abc import Iterable

# A name this long that a known name begins with is taken as its beginning.
SHORTEST_PREFIX = 3


def near_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that `name` may be a misspelling of, the nearest first.

    A name is near if at most a third of its characters (of the longer of the two; at least one) were inserted,
    left out, replaced or swapped with their neighbour, or if it begins with `name`. Case, and whether words are
    joined by a hyphen or an underscore, do not count.

    Args:
        name: What was written.
        known: Names to choose from.
        most: How many to return at most.
    """
    written = _plain(name)
    found = []
    for other in known:
        there = _plain(other)
        distance = edit_distance(written, there)
        begins = len(written) >= SHORTEST_PREFIX and there.startswith(written)
        if begins or distance <= max(1, max(len(written), len(there)) // 3):
            found.append((distance, other))
    return [other for _, other in sorted(found)[:most]]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def edit_distance(a: str, b: str) -> int:
    """The number of characters to insert, delete, replace or swap with their neighbour to turn `a` into `b`.

    No part is changed twice (the "optimal string alignment" distance).
    """
    # cost[i][j]: of turning the first i characters of a into the first j of b.
    cost = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            cost[i][j] = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost[i][j] = min(cost[i][j], cost[i - 2][j - 2] + 1)
    return cost[-1][-1]
