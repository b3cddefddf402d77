"""Suggestions for misspelled names."""

from __future__ import annotations

from collections.abc import Iterable

# Minimum length of a name that counts as the beginning of a known name.
SHORTEST_PREFIX = 3


def near_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that `name` may be a misspelling of, nearest first.

    A known name is near if at most a third of the characters (of the longer name; at least one) were inserted, deleted,
    replaced or swapped with their neighbour, or if it begins with `name`. Case, hyphens and underscores are ignored.

    Args:
        name: The unknown name.
        known: Names to choose from.
        most: Maximum number of names to return.
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
    """Return the number of insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.

    No substring is edited twice (the "optimal string alignment" distance).
    """
    # cost[i][j]: distance of the first i characters of a and the first j of b.
    cost = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            cost[i][j] = min(cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost[i][j] = min(cost[i][j], cost[i - 2][j - 2] + 1)
    return cost[-1][-1]
