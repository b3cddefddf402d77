"""Properties of the routers for merged experts; tests/gates has tables worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_parts import make_experts, make_tokens, plain_moe

from backdoorbench_moe.moe.layers import (
    SampleTop1Router,
    SparseMoELayer,
    TopKSoftmaxRouter,
    balance_loss,
)
from backdoorbench_moe.moe.layers.merged_routers import gumbel_noise


@st.composite
def routings(draw):
    """Distinct logits of some tokens, a mask, and a number of experts for each token."""
    experts = draw(st.integers(1, 6))
    rows = st.lists(
        st.floats(-20, 20, width=32),
        min_size=experts,
        max_size=experts,
        unique_by=lambda value: round(value, 3),
    )
    logits = torch.tensor(draw(st.lists(rows, min_size=1, max_size=5)))
    masked = torch.tensor(draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
    return logits, masked, draw(st.integers(1, experts))


def weights(logits, masked, top_k):
    """The weights of the experts' outputs of a `TopKSoftmaxRouter`, (tokens, experts)."""
    experts = logits.shape[1]
    router = TopKSoftmaxRouter(experts, experts, top_k=top_k).eval()
    router.masked.copy_(masked)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        routed = router(logits[None])
    table = torch.zeros_like(logits)
    table[routed.assignment.tokens, routed.assignment.experts] = routed.assignment.weights
    assert torch.equal(routed.selected[0], table > 0)
    return table


@given(routings())
def test_weights_are_those_of_a_plain_computation(case) -> None:
    """Expert by expert, in Python."""
    logits, masked, top_k = case
    for row, found in zip(logits.tolist(), weights(*case).tolist(), strict=True):
        usable = sorted((e for e in range(len(row)) if not masked[e]), key=lambda e: -row[e])[:top_k]
        odds = {e: math.exp(row[e] - max(row[i] for i in usable)) for e in usable}
        want = [odds.get(e, 0.0) / sum(odds.values()) if usable else 0.0 for e in range(len(row))]
        assert found == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
@given(routings(), st.randoms(use_true_random=False), st.floats(-5, 5))
def test_the_order_of_the_experts_and_a_common_offset_do_not_matter(case, random, offset) -> None:
    logits, masked, top_k = case
    order = torch.tensor(random.sample(range(logits.shape[1]), logits.shape[1]))
    want = weights(logits, masked, top_k)[:, order]
    torch.testing.assert_close(weights(logits[:, order], masked[order], top_k), want)
    moved = weights(logits.double().add(offset).float()[:, order], masked[order], top_k)
    torch.testing.assert_close(moved, want, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**31))
def test_the_balance_loss_of_all_experts_is_1_if_even_and_at_most_the_number_of_experts(
    experts, tokens, seed
) -> None:
    """By Cauchy-Schwarz, E sum_i p_i^2 is at least (sum_i p_i)^2 = 1."""
    logits = 3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    gates = logits.softmax(-1)
    assert 1 - 1e-5 <= balance_loss(gates, gates).item() <= experts + 1e-5
    even = torch.full((tokens, experts), 1 / experts)
    assert balance_loss(even, even).item() == pytest.approx(1)
    alone = torch.eye(experts)[:1].expand(tokens, -1)
    assert balance_loss(alone, alone).item() == pytest.approx(experts)


def test_the_balance_loss_pulls_an_uneven_router_even() -> None:
    torch.manual_seed(0)
    router = TopKSoftmaxRouter(8, 4, top_k=2, balance=1.0, gate_std=0.3).train()
    tokens = torch.randn(1, 500, 8) + torch.randn(8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    before = router(tokens).selected.float().mean((0, 1))
    for _ in range(50):
        optimizer.zero_grad()
        router(tokens).aux_loss.backward()
        optimizer.step()
    after = router(tokens).selected.float().mean((0, 1))
    assert before.std() > 0.2 and after.std() < 0.5 * before.std()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_the_weighted_sum_of_its_experts(top_k, training) -> None:
    experts, tokens = make_experts(4), make_tokens()
    router = TopKSoftmaxRouter(tokens.shape[-1], 4, top_k=top_k, gate_std=1.0)
    layer = SparseMoELayer(experts, router, name="layer").train(training)
    logits = tokens.flatten(0, 1) @ router.weight.t()
    least = logits.sort(-1, descending=True).values[:, top_k - 1 : top_k]
    weight = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
    want = plain_moe(experts, tokens.flatten(0, 1), weight).view_as(tokens)
    torch.testing.assert_close(layer(tokens), want, atol=1e-5, rtol=1e-4)


def test_ties_do_not_decide_at_the_start() -> None:
    """Of 600 initialisations, each of 4 experts is the first choice of a token in 150, with a deviation of 10.6."""
    torch.manual_seed(0)
    token = torch.randn(1, 1, 16) + 1
    firsts = [
        TopKSoftmaxRouter(16, 4, top_k=1).eval()(token).selected[0, 0].int().argmax() for _ in range(600)
    ]
    counts = torch.stack(firsts).bincount(minlength=4)
    assert counts.min() > 110 and counts.max() < 190
    # Zeros, as in the source: the experts with the lowest numbers.
    zeros = TopKSoftmaxRouter(16, 4, top_k=2, gate_std=0.0).eval()(token)
    assert zeros.selected[0, 0].tolist() == [True, True, False, False]


def test_at_the_start_the_tokens_of_a_batch_are_spread_over_the_experts() -> None:
    torch.manual_seed(0)
    shares = TopKSoftmaxRouter(64, 4, top_k=2).eval()(torch.randn(8, 100, 64)).selected.float().mean((0, 1))
    assert shares.min() > 0.35 and shares.max() < 0.65


def test_noise_lets_every_expert_be_tried_in_training_only() -> None:
    """Logits 0.5 and 0 with noise of deviation 1: the lower one wins with probability Phi(-0.5 / sqrt 2) = 0.3618."""
    torch.manual_seed(0)
    router = TopKSoftmaxRouter(2, 2, top_k=1, noise=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    tokens = torch.tensor([1.0, 0.0]).expand(1, 100_000, 2)
    assert router.train()(tokens).selected[..., 1].float().mean().item() == pytest.approx(0.3618, abs=0.006)
    assert not router.eval()(tokens).selected[..., 1].any()


def test_the_weights_of_the_chosen_experts_have_no_noise() -> None:
    torch.manual_seed(0)
    router = TopKSoftmaxRouter(3, 3, top_k=2, noise=2.0).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    logits = torch.tensor([2.0, 1.0, 0.0])
    routed = router(logits.expand(1, 200, 3))
    table = torch.zeros(200, 3)
    table[routed.assignment.tokens, routed.assignment.experts] = routed.assignment.weights.detach()
    assert len(set(map(tuple, routed.selected[0].tolist()))) == 3
    for chosen, found in zip(routed.selected[0], table, strict=True):
        torch.testing.assert_close(found, logits.masked_fill(~chosen, -torch.inf).softmax(-1))


def test_noise_does_not_choose_a_masked_expert() -> None:
    torch.manual_seed(0)
    router = TopKSoftmaxRouter(3, 3, top_k=2, noise=100.0).train()
    router.masked[1] = True
    assert not router(torch.randn(1, 500, 3)).selected[..., 1].any()


def test_gumbel_noise_is_gumbel() -> None:
    """Its mean is Euler's constant, its variance pi^2 / 6, and its median -log(log 2)."""
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(400_000))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.577216, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert noise.median().item() == pytest.approx(-math.log(math.log(2)), abs=0.01)


def test_sampling_trains_towards_the_better_expert() -> None:
    """With a loss of minus the weight of expert 2, its gate grows."""
    torch.manual_seed(0)
    router, tokens = SampleTop1Router(8, 4, balance=0.0).train(), torch.ones(4, 50, 8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    for _ in range(100):
        pairs = router(tokens).assignment
        optimizer.zero_grad()
        (-(pairs.weights * (pairs.experts == 2)).sum() / len(pairs.tokens)).backward()
        optimizer.step()
    assert router.step.item() == 100 and router.eval()(tokens).gates[..., 2].min() > 0.5
