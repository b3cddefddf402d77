"""Routers on hand-worked tables of gates."""

from __future__ import annotations

import math

import pytest
import torch

from backdoorbench_moe.moe.layers import ExpertChoiceRouter, TopKRouter, load_loss

# Four tokens, three experts; the first choices are 0, 0, 1, 0, the second ones 1, 2, 0, 2.
GATES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1], [0.9, 0.04, 0.06]])


def top_k(**options):
    router = TopKRouter(3, 3, top_k=2, gate_std=1.0, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    return router


def test_in_evaluation_nothing_is_noisy_dropped_or_lost():
    router = top_k().eval()
    routed = router(GATES.log().unsqueeze(0))
    torch.testing.assert_close(routed.gates[0], GATES)
    assert routed.aux_loss is None
    assert routed.selected[0].int().tolist() == [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]]
    # Not renormalised.
    assert routed.assignment.weights.sum().item() == pytest.approx(0.9 + 0.8 + 0.9 + 0.96)


def test_a_limit_in_evaluation_drops():
    routed = top_k(eval_capacity=0.375).eval()(GATES.log().unsqueeze(0))  # room for 1
    assert routed.selected[0].int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_a_masked_expert_gets_nothing_and_the_next_best_takes_over():
    router = top_k().eval()
    router.masked[0] = True
    routed = router(GATES.log().unsqueeze(0))
    assert routed.selected[0].int().tolist() == [[0, 1, 1]] * 4
    torch.testing.assert_close(routed.gates[0].sum(-1), torch.ones(4))
    router.masked[1] = True
    assert router(GATES.log().unsqueeze(0)).selected[0].int().tolist() == [[0, 0, 1]] * 4


def test_noise_has_the_standard_deviation_of_one_over_the_experts():
    torch.manual_seed(0)
    router = TopKRouter(2, 4, top_k=1, gate_std=0.0, capacity=None).train()
    gates = router(torch.zeros(1, 50_000, 2)).gates[0].log()
    # The logits, but for each token's log of its softmax's sum: centred noise of variance (1 - 1/E) / E^2.
    centred = gates - gates.mean(-1, keepdim=True)
    assert centred.std().item() == pytest.approx(0.25 * math.sqrt(0.75), rel=0.02)


def test_in_training_the_capacity_for_training_drops():
    routed = top_k(noise=0.0, capacity=0.375, eval_capacity=4.0).train()(
        GATES.log().unsqueeze(0)
    )  # room for 1
    assert routed.selected[0].int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_the_loss_weighs_importance_without_noise_and_load_with_it():
    """Importance by hand as in test_losses.py: sums of the gates without noise are 2.2, 1.24 and 0.56, mean 4 / 3."""
    importance = sum((s - 4 / 3) ** 2 for s in (2.2, 1.24, 0.56)) / 3 / (4 / 3) ** 2
    logits = GATES.log()
    quiet = top_k(noise=0.0, importance=0.5, load=0.25).train()(logits.unsqueeze(0))
    assert quiet.aux_loss.item() == pytest.approx(0.5 * importance, rel=1e-5), (
        "without noise there is no load"
    )
    router = top_k(noise=1.5, importance=0.5, load=0.25).train()
    torch.manual_seed(4)
    noisy = logits + 1.5 / 3 * torch.randn(4, 3)
    torch.manual_seed(4)
    routed = router(logits.unsqueeze(0))
    load = load_loss(logits, noisy, 0.5, 2).item()
    assert routed.aux_loss.item() == pytest.approx(0.5 * importance + 0.25 * load, rel=1e-5)


def test_routing_is_in_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed = top_k().eval()(GATES.log().unsqueeze(0))
    torch.testing.assert_close(routed.gates[0], GATES, rtol=1e-6, atol=1e-7)


def test_expert_choice_by_hand():
    """Room for ceil(2 * 4 / 3) = 3 of 4 tokens: each expert leaves the one that weighs it least, image by image."""
    router = ExpertChoiceRouter(3, 3, top_k=2, gate_std=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routed = router(torch.stack([GATES, GATES.flip(0)]).log())
    one = [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert routed.selected[0].int().tolist() == one
    assert routed.selected[1].int().tolist() == one[::-1]
    assert routed.aux_loss is None and routed.assignment.counts.tolist() == [6, 6, 6]
    weights = torch.zeros(8, 3)
    weights[routed.assignment.tokens, routed.assignment.experts] = routed.assignment.weights.detach()
    torch.testing.assert_close(weights[:4], GATES * torch.tensor(one))


def test_no_expert_has_room_for_more_tokens_than_there_are():
    routed = top_k(eval_capacity=100.0).eval()(GATES.log().unsqueeze(0))
    assert (
        routed.assignment.capacity == len(GATES) and routed.selected.sum() == routed.selected.numel() // 3 * 2
    )
