"""Experts that are gated MLPs, against the formula of one MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moe_parts import EXPERTS, FEATURES, HIDDEN, WAYS, make_tokens
from torch import nn

from backdoorbench_moe.moe.layers import GatedMLPExperts, SparseMoELayer, TopKRouter
from backdoorbench_moe.moe.pruning import silence


class GatedMLP(nn.Module):
    """One MLP of the form that Llama's have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.up_proj = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, FEATURES, bias=False)
        self.act_fn = nn.SiLU()


def make_experts(count: int = EXPERTS, *, copies: bool = False) -> GatedMLPExperts:
    torch.manual_seed(1)
    experts = GatedMLPExperts.like(GatedMLP(), num_experts=count, copies=copies)
    if not copies:
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.5)
    return experts


def one(experts: GatedMLPExperts, e: int, tokens: torch.Tensor) -> torch.Tensor:
    """SwiGLU with the weights of one expert."""
    gate, up, down = (fc.weights[e] for fc in (experts.gate_proj, experts.up_proj, experts.down_proj))
    return (F.silu(tokens @ gate.T) * (tokens @ up.T)) @ down.T


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_every_way_to_compute_a_layer_gives_the_weighted_sum_of_its_experts(way, top_k, monkeypatch):
    experts, tokens = make_experts(), make_tokens().requires_grad_()
    torch.manual_seed(2)
    layer = SparseMoELayer(
        experts, TopKRouter(FEATURES, EXPERTS, top_k=top_k, gate_std=1.0).eval(), name="here"
    )
    monkeypatch.setattr("backdoorbench_moe.moe.layers.sparse.dispatch", WAYS[way])
    outputs, routing = layer.route(tokens)
    weights = (routing.gates * routing.selected).transpose(1, 2)
    want = sum(weights[..., e, None] * one(experts, e, tokens) for e in range(EXPERTS))
    torch.testing.assert_close(outputs, want, rtol=1e-4, atol=1e-5)
    own = torch.autograd.grad(outputs.square().sum(), [tokens, *experts.parameters()], retain_graph=True)
    for got, expected in zip(
        own, torch.autograd.grad(want.square().sum(), [tokens, *experts.parameters()]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_experts_start_as_copies_or_drawn_apart():
    copied, drawn = (
        make_experts(3, copies=True),
        GatedMLPExperts.like(GatedMLP(), num_experts=3, copies=False),
    )
    assert all(torch.equal(weight, copied.up_proj.weights[0]) for weight in copied.up_proj.weights)
    assert not torch.equal(drawn.down_proj.weights[0], drawn.down_proj.weights[1])
    assert {key for key in copied.state_dict() if "bias" in key} == set()


def test_the_tap_sees_the_units_before_the_activation_and_a_silent_unit_adds_nothing():
    experts, tokens = make_experts(2), make_tokens(2)
    seen = []
    hook = experts.hidden.register_forward_hook(lambda *values: seen.append(values[2]))
    experts(tokens)
    hook.remove()
    group = experts.channel_groups()[1]
    assert group.layer is experts.gate_proj and (group.start, group.stop) == (HIDDEN, 2 * HIDDEN)
    torch.testing.assert_close(
        seen[0][:, group.start : group.stop], tokens[1] @ experts.gate_proj.weights[1].T
    )
    silence(experts.gate_proj, torch.arange(group.start, group.stop))
    outputs = experts(tokens)
    assert outputs[0].any() and not outputs[1].any()
