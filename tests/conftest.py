"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# One thread a process, before torch loads: xdist runs as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tiny import Tiny

from backdoorbench_moe import data


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    """Offer the data set "tiny" in this process."""
    data.registry.register("tiny")(Tiny)
    yield
    data.registry.unregister("tiny")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `make test-quick`: the first case of every test that is not slow."""
    chosen: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in chosen and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
            chosen.add(test)
