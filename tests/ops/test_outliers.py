"""Outliers and the anomaly index by hand, against the known bound, and against closed forms of the t distribution."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.ops.outliers import MOST, anomaly_indices, deviations, largest_deviation, studentised

numbers = st.lists(st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3)), min_size=2, max_size=43)


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


def test_an_odd_count_by_hand() -> None:
    """Median 10; distances 9, 1, 0, 1, 2, so that the MAD is 1."""
    found = anomaly_indices([1, 9, 10, 11, 12])
    assert found == pytest.approx([9 / 1.4826, 1 / 1.4826, 0, -1 / 1.4826, -2 / 1.4826])


def test_the_median_of_an_even_count_lies_between_the_two_middle_values() -> None:
    """Median 25; distances 24, 5, 5, 15, so that the MAD is 10. torch.median would take 20 and 5."""
    found = anomaly_indices([1, 20, 30, 40])
    assert found == pytest.approx([24 / 14.826, 5 / 14.826, -5 / 14.826, -15 / 14.826])


def test_if_most_values_are_equal_the_mean_deviation_takes_the_place_of_the_mad() -> None:
    """Nine classes of ten have no small trigger: median 1024, MAD 0, mean deviation 100."""
    found = anomaly_indices([1024.0] * 4 + [24.0] + [1024.0] * 5)
    assert found[4] == pytest.approx(1000 / (1.253314 * 100)) and found[4] > 2
    assert (np.delete(found, 4) == 0).all()


@pytest.mark.parametrize("values", [[5.0], [3.0, 3.0, 3.0], [0.0, 0.0]])
def test_equal_values_are_no_outliers(values) -> None:
    assert (anomaly_indices(values) == 0).all()


@given(numbers, st.floats(0.1, 10), st.floats(-50, 50))
def test_scale_and_shift_change_nothing(values, scale, shift) -> None:
    found = anomaly_indices(values)
    assert np.isfinite(found).all()
    if max(values) - min(values) > 0.1:
        moved = anomaly_indices([scale * value + shift for value in values])
        assert moved == pytest.approx(found, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_what_has_no_index(values) -> None:
    with pytest.raises(ValueError, match="expected finite numbers, at least one"):
        anomaly_indices(values)
