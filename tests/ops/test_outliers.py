"""Outliers by hand, against the known bound, and against closed forms of the t distribution."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.ops.outliers import MOST, deviations, largest_deviation, studentised


def test_deviations_by_hand() -> None:
    """0, 0, 0, 4: the mean is 1, the sum of squares 12, so the standard deviation is 2."""
    assert deviations(torch.tensor([0.0, 0, 0, 4])).tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    assert deviations(torch.tensor([0.1] * 7)).tolist() == [0.0] * 7
    assert deviations(torch.tensor([5.0])).tolist() == [0.0]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30))
def test_no_value_is_further_from_the_mean_than_possible(values) -> None:
    assert deviations(torch.tensor(values)).abs().max() <= largest_deviation(len(values)) + 1e-6


def test_three_deviations_need_eleven_values() -> None:
    for count in (4, 10, 11, 64):
        one = torch.zeros(count)
        one[0] = 1
        assert deviations(one)[0].item() == pytest.approx(largest_deviation(count))
    assert largest_deviation(10) < 3 < largest_deviation(11)


def test_studentised_by_hand() -> None:
    """10 beside 1, 2, 3: 8 above a mean of 2 with deviation 1, so t = 8 / sqrt(4/3), of 2 degrees of freedom."""
    t = 8 / math.sqrt(4 / 3)
    tail = 0.5 - t / (2 * math.sqrt(2 + t**2))
    found = studentised(torch.tensor([1.0, 2, 3, 10]))
    assert found[3].item() == pytest.approx(-NormalDist().inv_cdf(tail), rel=1e-6)
    assert found[0] < 0 and found.argmax() == 3


def test_few_values_can_be_outliers_and_equal_ones_are_none() -> None:
    assert studentised(torch.tensor([1.0, 1.001, 0.999, 9])).max() > 3 > largest_deviation(4)
    assert studentised(torch.tensor([2.0, 2, 2, 2])).tolist() == [0.0] * 4
    assert studentised(torch.tensor([2.0, 2, 2, 3])).tolist()[3] == MOST
    assert studentised(torch.tensor([1.0, 100.0])).tolist() == [0.0, 0.0]


def test_for_many_values_both_measures_agree() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(studentised(values), deviations(values), atol=0.02, rtol=0.01)


@given(st.lists(st.integers(0, 50), min_size=3, max_size=12), st.integers(1, 9), st.integers(-20, 20))
def test_scale_and_offset_do_not_matter(values, scale, offset) -> None:
    plain = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(studentised(scale * plain + offset), studentised(plain), atol=1e-5, rtol=1e-5)
