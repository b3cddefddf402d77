"""Routing statistics against hand-worked tables, independent computations and what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import hypergeom

from backdoorbench_moe.ops import routing

# Two images, two experts, four patches.
SELECTED = torch.tensor(
    [[[1, 1, 0, 0], [0, 1, 1, 0]], [[0, 0, 0, 0], [0, 0, 0, 1]]], dtype=torch.bool
)  # fmt: skip
OTHER = torch.tensor([[[1, 0, 1, 0], [0, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]]], dtype=torch.bool)  # fmt: skip


def random_gates(seed: int, *shape: int, over: str = "patches") -> torch.Tensor:
    raw = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return raw.softmax(-2 if over == "experts" else -1)


def random_selection(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def test_jaccard_by_hand() -> None:
    got = routing.jaccard(SELECTED, OTHER)
    assert got.shape == (2, 2, 2)
    # {0,1} with {0,2}: 1 of 3; with {1,2}: 1 of 3. {1,2} with {0,2}: 1 of 3; with itself 1. Nothing and nothing: 1.
    torch.testing.assert_close(got, torch.tensor([[[1 / 3, 1 / 3], [1 / 3, 1]], [[1, 0], [0, 0]]]))


def test_share_of_patches_that_change_by_hand() -> None:
    # {0,1} to {0,2} exchanges one of two; {3} to {0,1} keeps nothing; nothing to nothing changes nothing.
    assert routing.changed_share(SELECTED, OTHER).tolist() == [[0.5, 0.0], [0.0, 1.0]]


def test_counts_by_class_by_hand() -> None:
    got = routing.counts_by_class(SELECTED.repeat(2, 1, 1), torch.tensor([2, 0, 2, 0]), 3)
    assert got[2].tolist() == [[2, 2, 0, 0], [0, 2, 2, 0]]
    assert got[0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 2]] and not got[1].any()


def test_the_axis_of_the_gates() -> None:
    patches, experts = random_gates(0, 3, 4, 16), random_gates(0, 3, 4, 16, over="experts")
    assert routing.gates_over(patches) == "patches" and routing.gates_over(experts) == "experts"
    assert routing.gates_over(patches.bfloat16()) == "patches"
    assert routing.gates_over(2 * patches) == "neither"
    mixed = torch.cat([patches, experts])
    assert routing.gates_over(mixed) == "neither"


def test_gates_become_distributions() -> None:
    raw = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    assert routing.distributions(raw, "neither").tolist() == [[[0.25, 0.75], [0.0, 0.0]]]
    assert routing.distributions(raw, "experts").tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_entropy_by_hand() -> None:
    gates = torch.tensor([[[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]]]).double()
    torch.testing.assert_close(
        routing.normalised_entropy(gates, "patches"), torch.tensor([[0.5, 1, 0]]).double()
    )
    turned = routing.normalised_entropy(gates.transpose(1, 2), "experts")
    torch.testing.assert_close(turned, torch.tensor([[0.5, 1, 0]]).double())
    assert routing.normalised_entropy(torch.ones(1, 1, 3).double(), "experts").tolist() == [[0, 0, 0]]


def test_divergence_by_hand() -> None:
    first = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]]).double()
    second = torch.tensor([[[0, 1.0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]]).double()
    got = routing.js_divergence(first, second, "patches")
    torch.testing.assert_close(got, torch.tensor([[math.log(2), 0, math.log(2) / 2]]).double())


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["patches", "experts"]))
@settings(max_examples=60, deadline=None)
def test_divergence_is_scipys_and_bounded(seed: int, experts: int, patches: int, over: str) -> None:
    first, second = (
        routing.distributions(random_gates(s, 2, experts, patches, over=over), over) for s in (seed, seed + 1)
    )
    got = routing.js_divergence(first, second, over)
    axis = 1 if over == "experts" else 2
    expected = np.square(jensenshannon(first.numpy(), second.numpy(), axis=axis))
    if over == "patches":
        np.testing.assert_allclose(got, expected, atol=1e-9)
    else:
        np.testing.assert_allclose(got.sum(1), expected.mean(1), atol=1e-9)
    assert (got >= 0).all() and (got <= math.log(2) + 1e-12).all()
    assert not routing.js_divergence(first, first, over).any()
    torch.testing.assert_close(routing.js_divergence(second, first, over), got)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_overlap_is_that_of_sets(seed: int) -> None:
    first, second = random_selection(seed, 3, 4, 10), random_selection(seed + 1, 3, 2, 10)
    got = routing.jaccard(first, second)
    for b in range(3):
        for e in range(4):
            for f in range(2):
                one, other = (set(s.nonzero().flatten().tolist()) for s in (first[b, e], second[b, f]))
                expected = len(one & other) / len(one | other) if one | other else 1
                assert got[b, e, f].item() == pytest.approx(expected)
    own = routing.jaccard(first, first)
    assert (own.diagonal(dim1=1, dim2=2) == 1).all() and torch.equal(own, own.transpose(1, 2))
    assert not routing.changed_share(first, first).any()


@given(st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_blind_miss_is_hypergeometric(patches: int, data: st.DataObject) -> None:
    changed = torch.tensor(data.draw(st.lists(st.integers(0, patches), min_size=3, max_size=3)))
    taken = torch.tensor([[data.draw(st.integers(0, patches)) for _ in range(2)] for _ in range(3)])
    got = routing.blind_miss(changed, taken, patches)
    np.testing.assert_allclose(got, hypergeom.pmf(0, patches, changed[:, None], taken), atol=1e-9)


def test_a_blind_miss_against_simulation() -> None:
    """Three of twelve patches changed; experts draw 4 and 1 at random, twenty thousand times."""
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(20_000, 2, 12, generator=generator).argsort(-1)
    hit = torch.stack([(order[:, 0, :4] < 3).any(1), (order[:, 1, :1] < 3).any(1)], 1)
    got = 1 - routing.blind_miss(torch.tensor([3]), torch.tensor([[4, 1]]), 12)[0]
    torch.testing.assert_close(got, hit.double().mean(0), atol=0.01, rtol=0)


def test_no_images() -> None:
    nothing = torch.zeros(0, 3, 4, 8, dtype=torch.uint8)
    assert routing.changed_patches(nothing, nothing, 2).shape == (0, 8)
    assert routing.patch_sums(nothing, 2).shape == (0, 8)


def test_changed_patches_by_hand() -> None:
    clean = torch.zeros(2, 3, 4, 8, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[0, 2, 3, 3] = 1  # Row 1, column 1 of 2x4 tiles: patch 5.
    triggered[1, :, 0, 7] = 9  # Row 0, column 3: patch 3.
    got = routing.changed_patches(clean, triggered, 2)
    assert got.nonzero().tolist() == [[0, 5], [1, 3]] and got.shape == (2, 8)


def test_patch_sums_by_hand() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[0, :, :2, :2] = 255  # All of patch 0 is white: 4 pixels of 1.
    images[0, 0, 3, 3] = 51  # One channel of three at 0.2, in patch 3.
    torch.testing.assert_close(
        routing.patch_sums(images, 2), torch.tensor([[4, 0, 0, 0.2 / 3]], dtype=torch.float64)
    )


def test_kl_divergence_by_hand() -> None:
    """Two patches, two experts: p = (1/2, 1/2), q = (1/4, 3/4) gives ln 2 / 2 - ln(3/2) / 2; p = q gives 0."""
    reference = torch.tensor([[0.5, 0.25], [0.5, 0.75]])
    gates = torch.tensor([[[0.25, 0.25], [0.75, 0.75]]], requires_grad=True)
    loss = routing.kl_divergence(gates, reference)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(2) - math.log(1.5)) / 4, abs=1e-6)
    # -p/q, half of it for each of the two patches.
    torch.testing.assert_close(gates.grad, -torch.tensor([[[2.0, 1.0], [2 / 3, 1.0]]]) / 2)


def test_kl_divergence_of_gates_that_are_zero_is_finite() -> None:
    gates = torch.tensor([[[0.0], [1.0]]])
    assert routing.kl_divergence(gates, torch.tensor([[0.0], [1.0]])).item() == 0
    assert 10 < routing.kl_divergence(gates, torch.tensor([[0.5], [0.5]])).item() < 100
