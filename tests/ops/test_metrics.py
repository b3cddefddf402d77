"""Shares, their intervals, means over repeats, and accuracies near chance."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from backdoorbench_moe.ops.metrics import chance_rate, mean_std, near_chance, proportion


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 50_000), share=st.floats(0, 1))
def test_the_interval_is_scipys(n: int, share: float) -> None:
    hits = round(share * n)
    found = proportion(hits, n)
    assert (found.value, found.n) == (pytest.approx(100 * hits / n), n)
    expected = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert (found.low / 100, found.high / 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


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


def test_chance_is_the_most_frequent_class() -> None:
    assert chance_rate([10, 10, 10, 10]) == 0.25
    assert chance_rate([750, 60, 11820]) == pytest.approx(11820 / 12630)
    assert chance_rate([750] * 2 + [60] * 3) == pytest.approx(750 / 1680)
    assert chance_rate([0, 7]) == 1
    for counts in ([], [0, 0], [3, -1]):
        with pytest.raises(ValueError, match="chance_rate"):
            chance_rate(counts)


# (correct images, images, chance, near chance), worked by hand from Wilson's interval.
ACCURACIES = [
    (1000, 10000, 0.1, True),  # Always the same answer.
    (1001, 10000, 0.1, True),
    (0, 10000, 0.1, True),  # Worse than chance.
    (1500, 10000, 0.1, True),  # 14.3 to 15.7, all below 19.
    (1820, 10000, 0.1, True),  # 17.5 to 18.97.
    (1830, 10000, 0.1, False),  # 17.6 to 19.07.
    (6600, 10000, 0.1, False),
    (750, 12630, 750 / 12630, True),  # Always "50 km/h" on GTSRB.
    (1400, 12630, 750 / 12630, True),  # 10.6 to 11.65, below 2 x 5.94.
    (1450, 12630, 750 / 12630, False),  # Up to 12.04.
    (5300, 10000, 0.5, True),  # 52.0 to 53.98, below 55.
    (5600, 10000, 0.5, False),
    (250, 10000, 0.01, False),  # 2.2 to 2.8% of 100 classes: above 2%.
    (150, 10000, 0.01, True),
    (8, 64, 0.1, True),  # 6.5 to 22.8: nobody knows.
    (20, 64, 0.1, False),  # 21 to 43.
    (3, 4, 0.5, True),  # 30 to 95.
    (10, 10, 1.0, True),  # A single class: nothing to be learned.
]


@pytest.mark.parametrize(("hits", "n", "chance", "expected"), ACCURACIES)
def test_near_chance_by_hand(hits, n, chance, expected) -> None:
    assert near_chance(hits, n, chance) is expected


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 20_000), classes=st.integers(2, 1000), share=st.floats(0, 1))
def test_a_model_at_chance_is_always_near_chance_and_a_perfect_one_of_many_images_never(
    n, classes, share
) -> None:
    assert near_chance(int(n / classes), n, 1 / classes)
    if n >= 50:
        assert not near_chance(n, n, 1 / classes)
    # More correct images never make a model look worse.
    hits = round(share * n)
    if not near_chance(hits, n, 1 / classes) and hits < n:
        assert not near_chance(hits + 1, n, 1 / classes)


@pytest.mark.parametrize("chance", [0, -0.1, 1.1, 10])
def test_chance_is_a_share(chance) -> None:
    with pytest.raises(ValueError, match=r"chance in \(0, 1\]"):
        near_chance(5, 10, chance)
