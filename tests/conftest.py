"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from quick import mark_quick
from tiny import Tiny

from backdoorbench_moe import data

# On a busy machine, examples take longer to draw and to run.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    """Register the data set "tiny" in this process."""
    data.registry.register("tiny")(Tiny)
    yield
    data.registry.unregister("tiny")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `make test-quick`, before `-m` selects tests."""
    mark_quick(items)
