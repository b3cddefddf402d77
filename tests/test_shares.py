"""How many items a share is: what is written, what was divided, and what a message suggests."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.shares import share_of, smallest_share

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOTALS = st.integers(1, 10**7)


@pytest.mark.parametrize(
    ("share", "total", "count"),
    [
        (0.1, 160, 16),
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.1, 9, 0),
        (1.0, 7, 7),
        (0, 5, 0),
        (0.7, 10, 7),
        (1 / 3, 3, 1),
        (20 / 39_209, 39_209, 20),
    ],
)
def test_share_is_exact_and_rounded_down(share, total, count) -> None:
    assert share_of(share, total) == count


@given(percent=st.integers(0, 100), total=st.integers(0, 10**6))
def test_share_is_integer_arithmetic(percent: int, total: int) -> None:
    assert share_of(percent / 100, total) == percent * total // 100


@given(total=TOTALS, data=st.data())
def test_a_share_that_was_computed_as_n_of_total_is_n(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    assert share_of(count / total, total) == count


def test_every_n_of_a_whole_training_set_is_n() -> None:
    """GTSRB's 39,209 images, where 20/39209 used to give 19."""
    assert [share_of(n / 39_209, 39_209) for n in range(39_210)] == list(range(39_210))


@given(share=st.floats(0, 1), total=TOTALS)
def test_a_share_is_the_floor_of_what_is_written_or_its_own_quotient(share: float, total: int) -> None:
    count = share_of(share, total)
    floor = int(Fraction(repr(share)) * total)
    assert count == floor or (count == floor + 1 and count / total == share)


@given(one=st.floats(0, 1), other=st.floats(0, 1), total=TOTALS)
def test_a_larger_share_is_not_fewer(one: float, other: float, total: int) -> None:
    low, high = sorted((one, other))
    assert share_of(low, total) <= share_of(high, total)


@given(total=TOTALS)
def test_the_smallest_share_is_enough_short_and_not_much_more(total: int) -> None:
    share = smallest_share(total)
    assert 1 / total <= share <= 1 and share_of(share, total) >= 1
    assert Fraction(repr(share)) * total < Fraction(11, 10)
    assert len(f"{share:e}".partition("e")[0].rstrip("0").replace(".", "")) <= 2


@given(rate=st.floats(0, 1, exclude_min=True), images=TOTALS)
def test_a_rate_that_is_refused_names_one_that_is_taken(rate: float, images: int) -> None:
    try:
        assert PoisonSpec(rate=rate).count(images) >= 1
    except ConfigError as error:
        suggested = float(str(error).rpartition(" ")[2])
        assert PoisonSpec(rate=suggested).count(images) >= 1
        assert suggested > rate


def committed_counts() -> list[tuple[float, int, int]]:
    """Rate, training images and poisoned images of every committed run."""
    counts = set()
    for file in sorted(RESULTS.rglob("records.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            # An attack on experts poisons no training image, at no rate; one in charge of training, a share of every
            # batch, and no image once and for all.
            if (poison := record.get("poison")) and "rate" in poison:
                rate = 0.0 if record["spec"]["attack"] == "training-control" else poison["rate"]
                counts.add((rate, record["data"]["train_images"], poison["n"]))
    return sorted(counts)


def test_every_committed_run_keeps_its_number_of_poisoned_images() -> None:
    counts = committed_counts()
    assert len(counts) > 5
    for rate, images, poisoned in counts:
        assert PoisonSpec(rate=rate).count(images) == poisoned, (rate, images)
