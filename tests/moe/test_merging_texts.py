"""Merging models of texts, whose MLPs are gated, and which have no patches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.layers import TopKSoftmaxRouter
from backdoorbench_moe.moe.merging import (
    MergedModel,
    check_mergeable,
    expert_names,
    expert_of,
    load_experts,
    mlp_inputs,
    only_expert,
)

WORDS, FEATURES, HIDDEN = 11, 6, 10


class Gated(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(FEATURES, HIDDEN, bias=bias) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, FEATURES, bias=bias), nn.SiLU()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class Text(nn.Module):
    """An embedding, two gated MLPs on residual streams, and a head."""

    data_options = ("vocabulary", "context")

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(WORDS, FEATURES), nn.Linear(FEATURES, WORDS)
        self.blocks = nn.ModuleList([Gated(bias), Gated(bias)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        values = self.embedding(tokens)
        for block in self.blocks:
            values = values + block(values)
        return self.head(values)

    def mlps(self) -> dict[str, nn.Module]:
        return {f"blocks.{n}": block for n, block in enumerate(self.blocks)}


def tuned(base: Text, seed: int) -> Text:
    """A copy whose MLPs have other weights."""
    expert = copy.deepcopy(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for block in expert.blocks:
            for weight in block.parameters():
                weight.add_(torch.randn_like(weight))
    return expert.eval()


def top(count: int):
    return lambda features, experts: TopKSoftmaxRouter(features, experts, top_k=count, gate_std=1.0)


TOKENS = torch.arange(20).view(4, 5) % WORDS


@torch.no_grad()
def test_an_expert_alone_is_itself_and_can_be_taken_out_again():
    base = Text().eval()
    experts = [tuned(base, seed) for seed in (1, 2, 3)]
    merged = MergedModel(base, 3, top(2))
    torch.testing.assert_close(merged(TOKENS), base(TOKENS))
    load_experts(merged, base.state_dict(), [expert.state_dict() for expert in experts])
    assert not hasattr(merged, "patch_size")
    for number, expert in enumerate(experts):
        taken = expert_of(merged, number)
        assert all(torch.equal(taken[name], tensor) for name, tensor in expert.state_dict().items())
        with only_expert(merged, number):
            torch.testing.assert_close(merged(TOKENS), expert(TOKENS))
    output = merged.forward_routed(TOKENS)
    assert [routing.gates.shape for routing in output.routing] == [(4, 3, 5)] * 2


@torch.no_grad()
def test_the_inputs_of_its_mlps():
    base = Text().eval()
    with mlp_inputs(base) as inputs:
        base(TOKENS)
    assert list(inputs) == ["blocks.0", "blocks.1"]
    assert torch.equal(inputs["blocks.0"], base.embedding(TOKENS))
    assert expert_names(base) == {
        f"blocks.{n}.{part}_proj.weight" for n in range(2) for part in ("gate", "up", "down")
    }


def test_gated_mlps_with_biases_are_refused():
    with pytest.raises(
        ConfigError, match=r"^model: Text cannot be merged: blocks\.0: expected linear layers fc1 .+"
    ):
        check_mergeable(Text(bias=True))
