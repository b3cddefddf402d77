"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import Tiny

from backdoorbench_moe import data


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    """Offer the data set "tiny" in this process."""
    data.registry.register("tiny")(Tiny)
    yield
    data.registry.unregister("tiny")
