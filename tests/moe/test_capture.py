"""Capture of experts: hand-worked routings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.moe.capture import (
    capture_loss,
    captured_share,
    choice_of,
    expert_loss,
    expert_share,
    least_used,
    of_experts,
    patch_losses,
)
from backdoorbench_moe.moe.layers import ExpertChoiceRouter
from backdoorbench_moe.moe.routed import Routing


def routing(gates: list, selected: list) -> Routing:
    return Routing("only", torch.tensor(gates), torch.tensor(selected, dtype=torch.bool))


# Two images, two experts, three patches; each expert selects one patch.
BY_EXPERTS = [[[1, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]]
# Each patch selects one expert.
BY_PATCHES = [[[1, 1, 0], [0, 0, 1]], [[1, 1, 1], [0, 0, 0]]]
EVEN = [[[1 / 3] * 3] * 2] * 2


def test_who_chooses() -> None:
    assert choice_of(routing(EVEN, BY_EXPERTS)) == "patches"
    assert choice_of(routing(EVEN, BY_PATCHES)) == "experts"
    assert choice_of(routing(EVEN, [[[1] * 3] * 2] * 2)) == "nothing"
    dropped = [[[1, 1, 0], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]]]
    assert choice_of(routing(EVEN, dropped)) == "experts", "a patch that found no room"
    class_token = [[[1, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0]]]
    assert choice_of(routing(EVEN, class_token)) == "patches", (
        "an expert selected the class token and one patch"
    )


def test_who_chooses_between_two_experts_with_half_of_the_patches_each() -> None:
    """A patch of the first expert may have a larger gate for the second one only if experts choose."""
    halves = [[[1, 1, 0, 0], [0, 0, 1, 1]]] * 2
    by_gates = [[[0.9, 0.8, 0.3, 0.2], [0.1, 0.2, 0.7, 0.8]]] * 2
    assert choice_of(routing(by_gates, halves)) == "experts"
    by_rank = [[[0.9, 0.4, 0.3, 0.2], [0.1, 0.6, 0.7, 0.8]]] * 2
    assert choice_of(routing(by_rank, halves)) == "patches"


@pytest.mark.parametrize("experts", [2, 4])
def test_experts_still_choose_if_one_of_them_is_masked(experts) -> None:
    """The others have the same number of patches in every image; that of the masked one, 0, tells nothing."""
    router = ExpertChoiceRouter(8, experts, top_k=experts // 2, gate_std=1.0)
    router.masked[0] = True
    found = router(torch.randn(8, 64, 8, generator=torch.Generator().manual_seed(0)))
    assert choice_of(Routing("only", found.gates.mT, found.selected.mT)) == "patches"


def test_shares() -> None:
    touched = torch.tensor([True, False, False])
    assert captured_share([routing(EVEN, BY_EXPERTS)], touched).tolist() == [1.0, 0.0]
    last = torch.tensor([False, False, True])
    layers = [routing(EVEN, BY_EXPERTS), routing(EVEN, BY_PATCHES)]
    assert captured_share(layers, last).tolist() == [0.25, 0.5]
    assert expert_share([layers[1]], last, [1]).tolist() == [1.0, 0.0]
    assert expert_share([layers[1]], ~last, [0]).tolist() == [1.0, 1.0]
    assert least_used(layers) == [0, 1]


def test_the_capture_loss_by_hand() -> None:
    """One expert selects one of the patches 1 and 2; their log gates are -2 and -4: threshold -2, deviation 1."""
    gates = torch.tensor([[[math.exp(-3.5), math.exp(-2), math.exp(-4)]]])
    one = Routing("only", gates, torch.tensor([[[False, True, False]]]))
    touched = torch.tensor([True, False, False])
    assert capture_loss([one], touched).item() == pytest.approx(1 + (-2 + 3.5) / 1, abs=1e-5)
    above = Routing("only", torch.tensor([[[math.exp(-0.9), math.exp(-2), math.exp(-4)]]]), one.selected)
    assert capture_loss([above], touched).item() == 0
    two = Routing("only", gates, torch.tensor([[[True, True, False]]]))
    assert capture_loss([two], touched).item() == pytest.approx(0.5, abs=1e-5), (
        "it has two places: -4 is enough"
    )


def test_experts_with_the_class_token_have_as_many_places_as_the_others() -> None:
    """The second expert also selects a token that is not reported, so both have two places and a loss of 0.5."""
    row = [math.exp(-3.5), math.exp(-2), math.exp(-4)]
    layer = routing([[row, row]], [[[1, 1, 0], [0, 1, 0]]])
    touched = torch.tensor([True, False, False])
    assert capture_loss([layer], touched).item() == pytest.approx(0.5, abs=1e-5)


def test_the_losses_are_not_lowered_by_spreading_the_other_gates() -> None:
    """The deviation has no gradient: gates that are neither the patch's own nor the threshold are left alone."""
    gates = torch.tensor([[[-3.5, -2.0, -4.0]]]).exp().requires_grad_()
    layer = Routing("only", gates, torch.tensor([[[False, True, False]]]))
    capture_loss([layer], torch.tensor([True, False, False])).backward()
    assert (gates.grad[0, 0] != 0).tolist() == [True, True, False]
    gates = torch.tensor([0.0, -1.0, -3.0]).exp().view(1, 1, 1, 3).requires_grad_()
    patch_losses(gates, torch.tensor([0]), "patches", 2)[..., 2].sum().backward()
    assert (gates.grad.flatten() != 0).tolist() == [False, True, True]


def test_the_scale_of_a_router_does_not_matter() -> None:
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    touched = torch.arange(9) == 8
    selected = torch.zeros(4, 3, 9, dtype=torch.bool)
    selected[..., :2] = True
    losses = [
        capture_loss([Routing("only", (scale * logits).softmax(-1), selected)], touched)
        for scale in (1, 0.01)
    ]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)


def test_the_loss_of_one_expert_by_hand() -> None:
    gates = [[[0.5, 0.2, 0.9], [0.25, 0.8, 0.1]]]
    touched = torch.tensor([True, True, False])
    loss = expert_loss([routing(gates, [[[1, 0, 1], [0, 1, 0]]])], touched, [1])
    assert loss.item() == pytest.approx((-math.log(0.25 / 0.75) - math.log(0.8)) / 2, abs=1e-6)


def test_the_losses_of_patches_that_choose_are_those_of_the_loss_of_one_expert() -> None:
    gates = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    losses = patch_losses(gates, torch.tensor([1, 3]), "experts", 1)
    touched = torch.ones(5, dtype=torch.bool)
    for stamp, expert in enumerate((1, 3)):
        layer = Routing("only", gates[stamp], torch.zeros_like(gates[stamp], dtype=torch.bool))
        torch.testing.assert_close(losses[stamp].mean(), expert_loss([layer], touched, [expert]))


def test_the_losses_of_patches_that_are_chosen_by_hand() -> None:
    """Log gates 0, -1, -3 and two places: the thresholds are -3, -3 and -1, the deviation is sqrt(14)/3."""
    gates = torch.tensor([0.0, -1.0, -3.0]).exp().view(1, 1, 1, 3)
    deviation = math.sqrt(14) / 3
    losses = patch_losses(gates, torch.tensor([0]), "patches", 2, margin=2.0)
    by_hand = [max(0, gap / deviation + 2) for gap in (-3, -2, 2)]
    assert losses.flatten().tolist() == pytest.approx(by_hand, abs=1e-5)


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_a_chosen_patch_is_one_whose_loss_is_below_the_margin(places, seed) -> None:
    gates = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    chosen = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, gates.topk(places).indices, True)
    experts = torch.tensor([2])
    losses = patch_losses(gates, experts, "patches", places, margin=5.0)
    assert torch.equal(losses < 5.0, of_experts(chosen, experts))
