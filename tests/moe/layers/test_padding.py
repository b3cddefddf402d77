"""Padding: it counts neither in the balance loss nor in the routing that is reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_parts import EXPERTS, FEATURES, make_experts, make_tokens

from backdoorbench_moe.moe.layers import (
    SampleTop1Router,
    SparseMoELayer,
    TopKSoftmaxRouter,
    balance_loss,
    ignored,
    ignored_positions,
)

PADDING = torch.tensor([[False] * 5, [False, False, True, True, True], [False] * 4 + [True]])


def layer(kind=TopKSoftmaxRouter, **options) -> SparseMoELayer:
    torch.manual_seed(0)
    return SparseMoELayer(make_experts(), kind(FEATURES, EXPERTS, gate_std=1.0, **options), name="here")


def test_balance_by_hand():
    """Two counted tokens: mean weights 3/4 and 1/4, mean gates 0.6 and 0.4; twice 0.45 + 0.1."""
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    gates = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]])
    counted = torch.tensor([True, True, False])
    assert balance_loss(weights, gates, counted).item() == pytest.approx(1.1)
    assert balance_loss(weights, gates, ~torch.ones(3).bool()).item() == 0


@given(counted=st.lists(st.booleans(), min_size=1, max_size=12).filter(any), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_balance_is_that_of_the_counted_tokens_alone(counted, seed):
    draws = torch.Generator().manual_seed(seed)
    weights, gates = (torch.rand(len(counted), 3, generator=draws).softmax(-1) for _ in range(2))
    chosen = torch.tensor(counted)
    torch.testing.assert_close(
        balance_loss(weights, gates, chosen), balance_loss(weights[chosen], gates[chosen])
    )


@pytest.mark.parametrize("kind", [TopKSoftmaxRouter, SampleTop1Router])
def test_what_padding_holds_changes_no_loss_and_no_routing(kind):
    moe = layer(kind, **({"top_k": 2} if kind is TopKSoftmaxRouter else {})).train()
    tokens, found = make_tokens(), []
    for filler in (0.0, 3.0, -50.0):
        torch.manual_seed(1)
        with ignored(PADDING):
            outputs, routing = moe.route(tokens.masked_fill(PADDING.unsqueeze(-1), filler))
        assert not routing.gates.transpose(1, 2)[PADDING].any()
        assert not routing.selected.transpose(1, 2)[PADDING].any()
        assert routing.selected.transpose(1, 2)[~PADDING].any(-1).all()
        found.append((outputs[~PADDING], routing.gates, routing.aux_loss))
        moe.router.get_buffer("step").zero_() if kind is SampleTop1Router else None
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want)


def test_outside_of_the_block_every_position_counts():
    with ignored(PADDING):
        assert ignored_positions() is PADDING
    assert ignored_positions() is None
    _, routing = layer(top_k=2).eval().route(make_tokens())
    assert (routing.selected.sum(1) == 2).all()
