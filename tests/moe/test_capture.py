"""Capture of experts: hand-worked routings."""

from __future__ import annotations

import math

import pytest
import torch

from backdoorbench_moe.moe.capture import (
    capture_loss,
    captured_share,
    choice_of,
    expert_loss,
    expert_share,
    least_used,
)
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
