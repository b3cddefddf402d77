"""Routers on hand-worked gate tables, their room, and the losses that keep experts evenly loaded."""

from __future__ import annotations

import math

import pytest
import torch
from bbmoe_vmoe.losses import importance_loss, load_loss
from bbmoe_vmoe.routers import (
    ExpertChoiceRouter,
    TopKRouter,
    assign_chosen,
    best_experts,
    capacity_of,
    within_capacity,
)
from hypothesis import given
from hypothesis import strategies as st

# Four tokens, three experts; the first choices are 0, 0, 1, 0, the second ones 1, 2, 0, 2.
GATES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.9, 0.04, 0.06]])
CHOSEN = [[0, 1], [0, 2], [1, 0], [0, 2]]


def test_the_largest_gates_are_chosen_and_of_equals_the_first():
    assert best_experts(GATES, 2).tolist() == CHOSEN
    assert best_experts(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("capacity", "kept"),
    [
        # By priority tokens come as 3, 2, 0, 1. Expert 0: first choices of 3, 0, 1, then second of 2.
        (1, [[False, False], [False, False], [True, False], [True, True]]),
        (2, [[True, True], [False, True], [True, False], [True, True]]),
        (3, [[True, True], [True, True], [True, False], [True, True]]),
        (4, [[True, True]] * 4),
    ],
)
def test_room_goes_by_batch_priority_first_choices_first(capacity, kept):
    assert within_capacity(GATES, torch.tensor(CHOSEN), capacity).tolist() == kept


def test_pairs_lie_by_expert_those_without_room_last():
    chosen = torch.tensor(CHOSEN)
    kept = within_capacity(GATES, chosen, 1)
    found = assign_chosen(GATES, chosen, kept, 1)
    assert found.counts.tolist() == [4, 2, 2] and found.owners.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert found.tokens.tolist() == [3, 0, 1, 2, 2, 0, 3, 1]
    assert found.weights.tolist() == pytest.approx([0.9, 0, 0, 0, 0.7, 0, 0.06, 0])


@given(tokens=st.integers(1, 12), experts=st.integers(1, 5), capacity=st.integers(1, 12), data=st.data())
def test_room_is_never_exceeded_nor_left_while_someone_waits(tokens, experts, capacity, data):
    top_k = data.draw(st.integers(1, experts))
    gates = torch.rand(
        tokens, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    )
    chosen = best_experts(gates, top_k)
    kept = within_capacity(gates, chosen, capacity)
    for expert in range(experts):
        asked = chosen == expert
        assert (kept & asked).sum() == min(capacity, int(asked.sum()))


@pytest.mark.parametrize(
    ("sizes", "room"),
    [((100, 8, 2, 1.05), 27), ((100, 5, 1, 1.05), 21), ((64, 4, 1, 1.0), 16), ((65, 8, 2, 1.0), 17)],
)
def test_capacity_is_rounded_up_as_the_factor_is_written(sizes, room):
    assert capacity_of(*sizes) == room


def top_k(**options):
    router = TopKRouter(3, 3, top_k=2, gate_std=1.0, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    return router


def test_in_evaluation_nothing_is_noisy_dropped_or_lost():
    router = top_k().eval()
    choice = router(GATES.log().unsqueeze(0))
    torch.testing.assert_close(choice.gates[0], GATES)
    assert choice.loss is None
    assert choice.selected[0].int().tolist() == [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]]
    # Not renormalised.
    assert choice.assignment.weights.sum().item() == pytest.approx(0.9 + 0.8 + 0.9 + 0.96)


def test_a_limit_in_evaluation_drops():
    choice = top_k(eval_capacity=0.375).eval()(GATES.log().unsqueeze(0))  # room for 1
    assert choice.selected[0].int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_a_masked_expert_gets_nothing_and_the_next_best_takes_over():
    router = top_k().eval()
    router.masked[0] = True
    choice = router(GATES.log().unsqueeze(0))
    assert choice.selected[0].int().tolist() == [[0, 1, 1]] * 4
    torch.testing.assert_close(choice.gates[0].sum(-1), torch.ones(4))
    router.masked[1] = True
    assert router(GATES.log().unsqueeze(0)).selected[0].int().tolist() == [[0, 0, 1]] * 4


def test_noise_has_the_standard_deviation_of_one_over_the_experts():
    torch.manual_seed(0)
    router = TopKRouter(2, 4, top_k=1, gate_std=0.0, capacity=None).train()
    gates = router(torch.zeros(1, 50_000, 2)).gates[0].log()
    # The logits, but for each token's log of its softmax's sum: centred noise of variance (1 - 1/E) / E^2.
    centred = gates - gates.mean(-1, keepdim=True)
    assert centred.std().item() == pytest.approx(0.25 * math.sqrt(0.75), rel=0.02)


def test_routing_is_in_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice = top_k().eval()(GATES.log().unsqueeze(0))
    torch.testing.assert_close(choice.gates[0], GATES, rtol=1e-6, atol=1e-7)


def test_expert_choice_by_hand():
    """Room for ceil(2 * 4 / 3) = 3 of 4 tokens: each expert leaves the one that weighs it least, image by image."""
    router = ExpertChoiceRouter(3, 3, top_k=2, gate_std=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    choice = router(torch.stack([GATES, GATES.flip(0)]).log())
    one = [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert choice.selected[0].int().tolist() == one
    assert choice.selected[1].int().tolist() == one[::-1]
    assert choice.loss is None and choice.assignment.counts.tolist() == [6, 6, 6]
    weights = torch.zeros(8, 3)
    weights[choice.assignment.tokens, choice.assignment.owners] = choice.assignment.weights.detach()
    torch.testing.assert_close(weights[:4], GATES * torch.tensor(one))


def test_importance_by_hand():
    """Sums are 2.2, 1.24 and 0.56: mean 4 / 3."""
    sums = [2.2, 1.24, 0.56]
    want = sum((s - 4 / 3) ** 2 for s in sums) / 3 / (4 / 3) ** 2
    assert importance_loss(GATES).item() == pytest.approx(want, rel=1e-5)
    assert importance_loss(torch.full((5, 4), 0.25)).item() == pytest.approx(0, abs=1e-12)


def test_load_is_the_chance_to_be_chosen_once_more():
    """Against drawing the noise of one expert again, many times over, with the others' left as it was."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.2, 0.0, -0.1], [0.1, 0.3, 0.0]])
    noisy = logits + 0.3 * torch.randn(2, 3, generator=generator)
    threshold = noisy.sort(-1, descending=True).values[:, 1]
    draws = logits + 0.3 * torch.randn(200_000, 2, 3, generator=generator)
    load = (draws >= threshold[:, None]).double().mean(0).sum(0)
    want = (load.var(correction=0) / load.mean() ** 2).item()
    assert load_loss(logits, noisy, 0.3, 2).item() == pytest.approx(want, abs=2e-3)


def test_the_losses_pull_an_uneven_router_even():
    torch.manual_seed(0)
    router = TopKRouter(4, 4, top_k=1, gate_std=0.0, importance=1.0, load=1.0).train()
    with torch.no_grad():
        router.weight[0] += 0.2
    tokens = torch.rand(1, 200, 4)
    router(tokens).loss.backward()
    pull = router.weight.grad.sum(1)
    assert pull[0] > 0 and (pull[1:] < 0).all()


def test_no_expert_has_room_for_more_tokens_than_there_are():
    choice = top_k(eval_capacity=100.0).eval()(GATES.log().unsqueeze(0))
    assert (
        choice.assignment.capacity == len(GATES) and choice.selected.sum() == choice.selected.numel() // 3 * 2
    )
