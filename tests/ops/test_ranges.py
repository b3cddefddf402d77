"""Checks of numeric options, at the ends of each interval."""

from __future__ import annotations

import math
import re

import pytest

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_integer, check_interval

INSIDE = {"(0, 1)": [1e-9, 0.999], "[0, 1)": [0, 0.5], "(0, 1]": [1e-9, 1], "[0, 255]": [0, 255.0]}
OUTSIDE = {"(0, 1)": [0, 1, -1], "[0, 1)": [1, -1e-9], "(0, 1]": [0, 1.001], "[0, 255]": [-1, 255.5]}


@pytest.mark.parametrize("interval", INSIDE)
def test_an_interval_has_the_ends_that_it_shows(interval: str) -> None:
    for number in INSIDE[interval]:
        check_interval("share", number, interval)
    for number in [*OUTSIDE[interval], math.nan, math.inf, -math.inf]:
        message = re.escape(f"share: expected a number in {interval}, got {number}")
        with pytest.raises(ConfigError, match=message):
            check_interval("share", number, interval)


def test_integers() -> None:
    for number in (None, 2, 3):
        check_integer("steps", number, 2)
    with pytest.raises(ConfigError, match="steps: expected an integer of at least 2, got 1"):
        check_integer("steps", 1, 2)


def test_integers_without_a_bound_of_their_own_have_one() -> None:
    check_integer("epochs", 100_000)
    check_integer("steps", 1_000_000_000)
    with pytest.raises(ConfigError, match="gate_epochs: expected an integer of at most 100000, got 100001"):
        check_integer("gate_epochs", 100_001)
    with pytest.raises(ConfigError, match="steps: expected an integer of at most 1000000000, got"):
        check_integer("steps", 10**24)
