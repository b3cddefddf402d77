"""Shares, their intervals, and means over repeats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.ops.metrics import mean_std, proportion


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 50_000), share=st.floats(0, 1))
def test_wilson_interval_from_its_formula(n: int, share: float) -> None:
    hits, z = round(share * n), 1.959963984540054
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = proportion(hits, n)
    assert (found.value, found.n) == (pytest.approx(100 * p), n)
    assert found.low == pytest.approx(100 * max(centre - half, 0), abs=1e-9)
    assert found.high == pytest.approx(100 * min(centre + half, 1), abs=1e-9)


def test_a_perfect_score_is_not_a_certain_one() -> None:
    found = proportion(10, 10)
    assert (found.value, found.high) == (100, 100)
    assert found.low == pytest.approx(72.2467, abs=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="hits"):
        proportion(hits, n)


def test_mean_and_sample_deviation() -> None:
    assert mean_std([2, 4, 4, 4, 5, 5, 7, 9]) == (5, pytest.approx(math.sqrt(32 / 7)))
    assert mean_std([91.5]) == (91.5, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_std([])
