"""Every deviation that a part declares names a conformance test of the part, and the part fails that test."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def test_deviations(deviating_part: tuple[str, str], deviation_faults: Callable[..., list[str]]) -> None:
    """This test runs after all others, since it checks their outcomes."""
    if faults := deviation_faults(deviating_part):
        pytest.fail("; ".join(faults), pytrace=False)
