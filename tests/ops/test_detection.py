"""AUROC, its interval, and thresholds, against other ways to the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from backdoorbench_moe.ops.detection import auroc, calibrate_threshold, threshold_rank

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30).map(np.array)


@pytest.mark.slow
@given(scores, scores)
def test_it_is_the_share_of_pairs_in_order_and_scipys_u(clean, triggered) -> None:
    pairs = [(t > c) + 0.5 * (t == c) for t in triggered for c in clean]
    found = auroc(clean, triggered)
    assert found.value == pytest.approx(100 * sum(pairs) / len(pairs))
    u = mannwhitneyu(triggered, clean).statistic
    assert found.value == pytest.approx(100 * u / (len(clean) * len(triggered)))
    assert 0 <= found.low <= found.value <= found.high <= 100 and found.n == len(clean) + len(triggered)


@given(scores, scores)
def test_turned_round_it_is_the_complement(clean, triggered) -> None:
    one, other = auroc(clean, triggered), auroc(-clean, -triggered)
    assert one.value == pytest.approx(100 - other.value)
    assert (one.low, one.high) == pytest.approx((100 - other.high, 100 - other.low), abs=1e-6)


@pytest.mark.parametrize(("m", "n", "mean"), [(50, 50, 50), (20, 60, 40), (60, 20, 40)])
def test_the_interval_by_hand(m, n, mean) -> None:
    """At its ends the measured area is 1.96 of Hanley and McNeil's standard errors away.

    Both groups count as having the mean of their sizes, as in Newcombe's method 5.
    """
    clean, triggered = np.arange(float(m)), np.arange(float(n)) + 10
    found = auroc(clean, triggered)
    area = found.value / 100
    for end in (found.low / 100, found.high / 100):
        first, second = end / (2 - end), 2 * end**2 / (1 + end)
        variance = end * (1 - end) + (mean - 1) * (first - end**2) + (mean - 1) * (second - end**2)
        assert abs(area - end) == pytest.approx(1.959964 * (variance / (m * n)) ** 0.5, rel=1e-5)
    assert found.low < found.value < found.high


def test_a_perfect_split_has_an_interval_too_and_it_shrinks() -> None:
    few, many = (auroc(np.zeros(n), np.ones(n)) for n in (10, 1000))
    assert few.value == many.value == few.high == 100
    assert 50 < few.low < 90 and 99 < many.low < 100


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Normal scores a standard deviation apart: the area is Phi(1 / sqrt 2) = 76.02%."""
    rng = np.random.default_rng(5)
    found = [auroc(rng.normal(0, 1, 60), rng.normal(1, 1, 40)) for _ in range(400)]
    covered = np.mean([f.low <= 76.0250 <= f.high for f in found])
    assert 0.92 <= covered <= 0.985
    assert np.mean([f.value for f in found]) == pytest.approx(76.0, abs=1)


def test_empty_groups_are_refused() -> None:
    for groups in ((np.array([]), np.ones(2)), (np.ones(2), np.array([]))):
        with pytest.raises(ValueError, match="expected scores of both groups"):
            auroc(*groups)


@pytest.mark.parametrize(
    ("fpr", "count", "k"),
    [
        (0.05, 19, 1),
        (0.05, 18, 0),
        (0.05, 39, 2),
        (0.05, 38, 1),
        (0.5, 1, 1),
        (0.9, 3, 3),
        (0.29, 99, 29),  # 0.29 * 100 is 28.999999999999996 in floating point.
        (0.1, 0, 0),
        (0.05, -6, 0),
    ],
)
def test_how_many_may_be_called_by_hand(fpr, count, k) -> None:
    assert threshold_rank(fpr, count) == k


def test_the_threshold_by_hand() -> None:
    clean = np.array([0.3, 0.9, 0.1, 0.7, 0.5, 0.2, 0.4, 0.8, 0.6])
    assert calibrate_threshold(clean, 0.1) == 0.9 and calibrate_threshold(clean, 0.25) == 0.8
    with pytest.raises(ValueError, match="got 9"):
        calibrate_threshold(clean, 0.05)


@settings(max_examples=25)
@given(st.integers(20, 60), st.sampled_from([0.05, 0.1, 0.3]), st.integers(0, 10), st.booleans())
def test_a_further_clean_score_is_called_no_more_often_than_asked(count, fpr, seed, tied) -> None:
    """Each of count + 1 scores left out in turn: as many are called as may be, fewer where some are equal."""
    values = np.random.default_rng(seed).normal(size=count + 1).round(0 if tied else 9)
    called = [values[i] > calibrate_threshold(np.delete(values, i), fpr) for i in range(count + 1)]
    assert sum(called) <= fpr * (count + 1) + 1e-9
    if not tied:
        assert sum(called) == threshold_rank(fpr, count)
