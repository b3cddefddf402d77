"""Intervals over seeds: by hand, against known ones, and what must hold for any shares.

Their coverage is simulated in tests/benchmarks/test_interval_coverage.py.
"""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.ops.intervals import difference_interval, paired_interval, seeds_interval
from backdoorbench_moe.ops.metrics import proportion

SHARES = st.lists(st.floats(0, 100), min_size=3, max_size=12)
IMAGES = st.integers(1, 50_000)


def test_three_seeds_by_hand() -> None:
    """50, 51, 52% of 9,000: 1 point² times (4.302653 / 1.959964)² over 3 for the seeds, 0.28 point² for the images."""
    variance = 4.302653**2 / 1.959964**2 / 3 + 51 * 49 / 9000
    effective = 51 * 49 / variance
    assert effective == pytest.approx(1326.38, abs=0.01)
    # Wilson's formula with 1326.38 images.
    scale = 1 + 3.841459 / effective
    centre = (51 + 100 * 3.841459 / 2 / effective) / scale
    half = 1.959964 / scale * (51 * 49 / effective + 100**2 * 3.841459 / 4 / effective**2) ** 0.5
    assert seeds_interval([50, 51, 52], 9000) == pytest.approx((centre - half, centre + half), abs=1e-4)
    assert seeds_interval([50, 51, 52], 9000) == pytest.approx((48.31, 53.69), abs=0.01)


@pytest.mark.parametrize("hits", [0, 1, 20, 900, 1799, 1800])
@pytest.mark.parametrize("seeds", [3, 10])
def test_seeds_that_agree_have_wilsons_interval_of_one_test_set(hits, seeds) -> None:
    """The same images ten times over tell no more of other images."""
    one = proportion(hits, 1800)
    found = seeds_interval([one.value] * seeds, 1800)
    assert found == pytest.approx((one.low, one.high), abs=1e-6)


def test_with_very_many_images_it_tends_to_students_t() -> None:
    # 1 / sqrt(3) times 4.302653.
    low, high = seeds_interval([50, 51, 52], 10**9)
    assert (low, high) == pytest.approx((51 - 2.4842, 51 + 2.4842), abs=0.01)


@pytest.mark.parametrize("values", [[27.8 - 14.2, 27.8 + 14.2], [100.0], []])
def test_fewer_than_three_seeds_have_none(values) -> None:
    assert seeds_interval(values, 9000) is None


@pytest.mark.parametrize(("values", "images"), [([1, 2, 101], 10), ([-1, 2, 3], 10), ([1, 2, 3], 0)])
def test_impossible_shares(values, images) -> None:
    with pytest.raises(ValueError, match="seeds_interval: expected 0 to 100%"):
        seeds_interval(values, images)


@pytest.mark.parametrize(("off", "end"), [(100.0000002, 100.0), (-0.0000002, 0.0)])
def test_a_share_that_rounding_moved_off_the_scale_is_its_end(off, end) -> None:
    """Weights of gates, rounded to float32, may add up to a little more than 1."""
    assert seeds_interval([off, 50, 60], 9000) == seeds_interval([end, 50, 60], 9000)
    low, high = seeds_interval([off] * 3, 9000)
    assert 0 <= low < high <= 100
    assert seeds_interval([off, 50], 9000) is None
    for beyond in (100.1, -0.1):
        with pytest.raises(ValueError, match="seeds_interval: expected 0 to 100%"):
            seeds_interval([off, 50, beyond], 9000)


@settings(deadline=None, max_examples=200)
@given(values=SHARES, images=IMAGES)
def test_it_stays_on_the_scale_around_the_mean_and_has_a_width(values, images) -> None:
    low, high = seeds_interval(values, images)
    mean = statistics.fmean(values)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 100
    assert high > low


@settings(deadline=None, max_examples=100)
@given(values=SHARES, images=IMAGES)
def test_failures_have_the_mirrored_interval(values, images) -> None:
    low, high = seeds_interval(values, images)
    other = seeds_interval([100 - value for value in values], images)
    assert other == pytest.approx((100 - high, 100 - low), abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(values=SHARES, images=st.integers(1, 10_000))
def test_more_images_never_widen_it(values, images) -> None:
    few, many = seeds_interval(values, images), seeds_interval(values, 2 * images)
    assert many[1] - many[0] <= few[1] - few[0] + 1e-9


def test_difference_of_two_wilson_intervals_is_newcombes() -> None:
    """His example (a), method 10: 56 of 70 minus 48 of 80 is 0.2 with 0.0524 to 0.3339 (1998, table II)."""
    first, second = proportion(56, 70), proportion(48, 80)
    found = difference_interval(second.value, (second.low, second.high), first.value, (first.low, first.high))
    assert found == pytest.approx((5.24, 33.39), abs=0.005)


@settings(deadline=None, max_examples=100)
@given(a=SHARES, b=SHARES, images=IMAGES)
def test_a_difference_stays_on_its_scale_and_changes_its_sign_with_the_sides(a, b, images) -> None:
    means = statistics.fmean(a), statistics.fmean(b)
    ends = seeds_interval(a, images), seeds_interval(b, images)
    low, high = difference_interval(means[0], ends[0], means[1], ends[1])
    assert -100 - 1e-9 <= low <= means[1] - means[0] <= high <= 100 + 1e-9
    back = difference_interval(means[1], ends[1], means[0], ends[0])
    assert back == pytest.approx((-high, -low))


def test_a_side_without_an_interval_gives_none() -> None:
    assert difference_interval(1, None, 2, (1, 3)) is None
    assert difference_interval(1, (0, 2), 2, None) is None


def test_a_paired_difference_by_hand() -> None:
    """10, 50, 90% before and 9, 47, 88% after, on 9,000 images: the mean difference is -2, its deviation 1 point.

    Seeds: 4.302653 x 1 / sqrt(3). Images: Wilson's intervals of 50 and 48%, half-widths 1.0328 and 1.0320.
    """
    low, high = paired_interval([10, 50, 90], [9, 47, 88], 9000)
    half = ((4.302653 / 3**0.5) ** 2 + 1.0328**2 + 1.0320**2) ** 0.5
    assert (low, high) == pytest.approx((-2 - half, -2 + half), abs=0.001)
    ends = [seeds_interval(values, 9000) for values in ([10, 50, 90], [9, 47, 88])]
    apart = difference_interval(50, ends[0], 48, ends[1])
    assert apart[1] - apart[0] > 100, "the same values of different models"


def test_a_paired_difference_needs_three_seeds_on_both_sides() -> None:
    assert paired_interval([1, 2], [1, 2], 100) is None
    with pytest.raises(ValueError, match="as many seeds on both sides, got 3 and 4"):
        paired_interval([1, 2, 3], [1, 2, 3, 4], 100)


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=3, max_size=12), images=IMAGES
)
def test_a_paired_difference_stays_on_its_scale_and_changes_its_sign_with_the_sides(values, images) -> None:
    a, b = map(list, zip(*values, strict=True))
    low, high = paired_interval(a, b, images)
    assert -100 <= low <= statistics.fmean(b) - statistics.fmean(a) + 1e-9 and low < high <= 100
    assert paired_interval(b, a, images) == pytest.approx((-high, -low))
