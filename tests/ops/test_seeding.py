"""Derived seeds, and uniform numbers as a function of seed and place against SplitMix64 in Python's own integers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from backdoorbench_moe.ops.seeding import derive_seed, generator, seeded, uniform_at

WORD = (1 << 64) - 1


def splitmix64(seed: int, number: int) -> int:
    """Output `number`, from 0, of the generator started at `seed`, as published: modulo 2**64, shifts unsigned."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


# The outputs that the reference implementation in C gives for this seed.
PUBLISHED_SEED = 1234567
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_the_published_outputs() -> None:
    assert [splitmix64(PUBLISHED_SEED, number) for number in range(5)] == PUBLISHED
    drawn = uniform_at(PUBLISHED_SEED, torch.arange(5))
    assert drawn.tolist() == [(output >> 40) / 2**24 for output in PUBLISHED]


@pytest.mark.parametrize("seed", [0, 1, derive_seed(7, "warp noise"), (1 << 63) - 1])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (5, 4, 2)])
def test_it_is_splitmix64_at_any_place(seed: int, shape: tuple[int, ...]) -> None:
    places = [0, 1, 50_000, 2**31, 3]
    drawn = uniform_at(seed, torch.tensor(places), *shape)
    assert drawn.shape == (5, *shape) and drawn.dtype == torch.float32
    count = math.prod(shape)
    expected = [[(splitmix64(seed, p * count + e) >> 40) / 2**24 for e in range(count)] for p in places]
    assert drawn.view(5, count).tolist() == expected


def test_a_draw_does_not_depend_on_the_batch() -> None:
    places = torch.tensor([8, 3, 3, 1_281_166, 0])
    drawn = uniform_at(11, places, 4, 4)
    order = torch.tensor([2, 4, 0, 3, 1])
    assert torch.equal(uniform_at(11, places[order], 4, 4), drawn[order])
    assert torch.equal(torch.cat([uniform_at(11, place, 4, 4) for place in places.split(2)]), drawn)
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert uniform_at(11, places[:0], 4, 4).shape == (0, 4, 4)


def test_no_generator_is_used() -> None:
    state = torch.get_rng_state()
    first = uniform_at(5, torch.arange(3), 2)
    torch.manual_seed(9)
    assert torch.equal(uniform_at(5, torch.arange(3), 2), first)
    torch.set_rng_state(state)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_uniform_over_places_and_within_a_place(seed: int) -> None:
    """Chi-square in 64 cells and Kolmogorov-Smirnov; the seeds are fixed, so this passes always or never."""
    # Along one place, along places, and the bits of one element at every place.
    for drawn in (uniform_at(seed, torch.arange(1), 200_000), uniform_at(seed, torch.arange(2000), 10, 10)):
        values = drawn.flatten().double().numpy()
        assert values.min() >= 0 and values.max() < 1
        cells = torch.histc(drawn, 64, 0, 1)
        assert stats.chisquare(cells.numpy()).pvalue > 1e-3
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    one = uniform_at(seed, torch.arange(20_000), 10)[:, 3].double().numpy()
    assert stats.kstest(one, "uniform").pvalue > 1e-3


def test_neighbours_and_seeds_are_uncorrelated() -> None:
    """Correlations of n = 100,000 pairs have a standard deviation of 1 / sqrt(n); five of them are allowed."""
    n = 100_000
    bound = 5 / math.sqrt(n)
    drawn = uniform_at(3, torch.arange(n), 2)
    other = uniform_at(4, torch.arange(n), 2)
    pairs = [
        (drawn[:, 0], drawn[:, 1]),
        (drawn[:-1, 0], drawn[1:, 0]),
        (drawn[:, 0], other[:, 0]),
    ]
    for one, two in pairs:
        assert abs(torch.corrcoef(torch.stack((one, two)))[0, 1].item()) < bound


def test_a_derived_seed_is_the_start_of_a_digest() -> None:
    """`printf 7/order/3 | sha256sum` begins with these 16 digits, of which the lowest bit is dropped."""
    assert derive_seed(7, "order", 3) == int("19cd16803fef73ea", 16) >> 1
    assert derive_seed(7, "order", "3") == derive_seed(7, "order", 3), "a number is as it is written"
    seeds = [
        derive_seed(1, "a", 12),
        derive_seed(1, "a", 1, 2),
        derive_seed(11, "a", 2),
        derive_seed(1, "a1", 2),
    ]
    assert len(set(seeds)) == 4, "purposes that are written alike without a separator"


def test_a_seeded_block_draws_the_same_and_leaves_no_trace() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    inside = []
    for purpose in ("noise", "noise", "init"):
        with seeded(5, purpose, 0):
            inside.append(torch.rand(3))
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert torch.equal(inside[0], inside[1]) and not torch.equal(inside[0], inside[2])
    assert torch.equal(inside[0], torch.rand(3, generator=generator(5, "noise", 0)))
