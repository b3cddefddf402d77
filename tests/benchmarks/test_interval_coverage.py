"""The intervals over seeds hold the truth as often as they claim: the script's simulation, smaller."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
REPEATS = 1500
# Of 1,500 intervals that hold the truth with a probability of 93.5%, fewer than 91.5% do so in 0.1% of all cases.
LEAST = 91.5


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("interval_coverage_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


CELLS = [
    (0.02, 0.01),
    (0.5, 0.0),
    (0.5, 0.15),
    (0.9, 0.05),
    (0.99, 0.0),
    (0.99, 0.01),
    (0.999, 0.001),
    (1.0, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "std"), CELLS)
@pytest.mark.parametrize("shared", [False, True], ids=["own images", "same images"])
def test_coverage_of_a_mean(script, mean, std, shared) -> None:
    rng = np.random.default_rng(11)
    for seeds in (3, 5, 10):
        found = script.simulate(mean, std, 1800, seeds, shared=shared, repeats=REPEATS, rng=rng)
        assert found.share >= LEAST, (seeds, found)
        assert found.width > 0


def test_the_simulation_tells_a_bad_interval_from_a_good_one(script) -> None:
    """Student's t knows nothing of the images, nor of the end of the scale."""
    rng = np.random.default_rng(12)
    for mean, std, at_most in ((0.9, 0.0, 20), (0.999, 0.001, 85), (0.99, 0.01, 90)):
        found = script.simulate(
            mean, std, 1800, 3, shared=True, repeats=500, rng=rng, method=script.student_interval
        )
        assert found.share <= at_most


def test_where_it_fails_is_known(script) -> None:
    """Most seeds at 100%, rare ones far below: three of them seldom show it. The docstring says so."""
    found = script.simulate(0.99, 0.03, 9000, 3, shared=False, repeats=500, rng=np.random.default_rng(13))
    assert 55 <= found.share <= 80


def test_more_seeds_and_images_make_it_narrower(script) -> None:
    rng = np.random.default_rng(14)
    widths = [
        script.simulate(0.9, 0.005, images, seeds, shared=False, repeats=500, rng=rng).width
        for images, seeds in ((1800, 3), (9000, 3), (9000, 5), (9000, 10))
    ]
    assert widths == sorted(widths, reverse=True)
    # No wider than needed: with 2 points between seeds Student's t alone asks for 4.30 x 2 / sqrt(3) on each side.
    wide = script.simulate(0.9, 0.02, 9000, 3, shared=False, repeats=500, rng=rng).width
    assert wide < 1.2 * 2 * 4.30 * 2 / 3**0.5


@pytest.mark.parametrize(("a", "b"), [((0.5, 0.05), (0.6, 0.05)), ((1.0, 0.0), (0.99, 0.002))])
def test_coverage_of_a_difference(script, a, b) -> None:
    rng = np.random.default_rng(15)
    for seeds in (3, 5):
        assert script.simulate_difference(a, b, 1800, seeds, repeats=600, rng=rng).share >= 93


@pytest.mark.parametrize(("a", "b"), [((0.5, 0.05), (0.6, 0.05)), ((0.9, 0.05), (0.99, 0.002))])
def test_coverage_of_a_difference_of_the_same_models(script, a, b) -> None:
    """Where the seeds differ much, but the difference does not, it is a fraction as wide as that of other models."""
    rng = np.random.default_rng(16)
    for seeds in (3, 5):
        found = script.simulate_pairs(a, b, 1800, seeds, repeats=600, rng=rng)
        assert found.share >= 91.5  # See LEAST.
        other = script.simulate_difference(a, b, 1800, seeds, repeats=100, rng=rng)
        assert found.width < (0.5 if a[1] == b[1] else 1.1) * other.width


def test_the_committed_table_is_of_this_grid(script) -> None:
    """And it claims nothing that the docstring does not: 93% or more wherever there is no pole."""
    text = (SCRIPT.parent / "results" / "interval-coverage" / "coverage.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert len(rows) == len(script.REGULAR + script.POLES) * len(script.IMAGES) * len(script.SEEDS)
    regular = rows[: len(script.REGULAR) * len(script.IMAGES) * len(script.SEEDS)]
    assert [(float(row[0]), float(row[1])) for row in regular[::6]] == [
        pytest.approx((100 * mean, 100 * std)) for mean, std in script.REGULAR
    ]
    assert min(float(row[n]) for row in regular for n in (4, 6)) >= 93
