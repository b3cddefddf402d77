"""The anomaly index, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.ops.outliers import anomaly_indices

numbers = st.lists(st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3)), min_size=2, max_size=43)


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
