"""Which tests `make test-quick` runs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def mark_quick(items: Iterable[pytest.Item]) -> None:
    """Mark the first case of every test that is not slow."""
    chosen: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in chosen and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
            chosen.add(test)
