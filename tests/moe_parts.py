"""Small experts, routers and layers, and a plain computation of what they give."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import nn

from backdoorbench_moe.moe.layers import (
    ExpertChoiceRouter,
    MLPExperts,
    SoftMoELayer,
    SoftRouter,
    SparseMoELayer,
    TopKRouter,
)
from backdoorbench_moe.moe.layers.dispatching import dispatch_batched, dispatch_each, dispatch_grouped

IMAGES, TOKENS, FEATURES, HIDDEN, EXPERTS = 3, 5, 8, 16, 4
WAYS = {"each": dispatch_each, "grouped": dispatch_grouped, "batched": dispatch_batched}
ROUTERS = {
    "top-k": lambda: TopKRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0).eval(),
    "top-k with little room": lambda: TopKRouter(
        FEATURES, EXPERTS, top_k=2, gate_std=1.0, eval_capacity=0.4
    ).eval(),
    "all": lambda: TopKRouter(FEATURES, EXPERTS, top_k=EXPERTS, gate_std=1.0).eval(),
    "expert choice": lambda: ExpertChoiceRouter(FEATURES, EXPERTS, top_k=2, gate_std=1.0),
}


def make_mlp() -> Mlp:
    """A dense MLP, always the same."""
    torch.manual_seed(1)
    return Mlp(FEATURES, HIDDEN)


def stack(mlp: Mlp, count: int, *, copies: bool) -> MLPExperts:
    """Experts like an MLP."""
    return MLPExperts(mlp.fc1, mlp.act, mlp.fc2, num_experts=count, copies=copies)


def make_experts(count: int = EXPERTS) -> MLPExperts:
    """Experts whose weights and biases are large enough to matter."""
    experts = stack(make_mlp(), count, copies=False)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def make_tokens(count: int = IMAGES) -> torch.Tensor:
    """(count, TOKENS, FEATURES), always the same."""
    return torch.randn(count, TOKENS, FEATURES, generator=torch.Generator().manual_seed(2))


def make_sparse(kind=TopKRouter, top_k=2, count=EXPERTS, **options) -> SparseMoELayer:
    """A sparse layer called "here" whose first token is no patch."""
    router = kind(FEATURES, count, top_k=top_k, gate_std=1.0, **options)
    return SparseMoELayer(make_experts(count), router, name="here", num_prefix_tokens=1)


def make_soft(slots: int = 2) -> SoftMoELayer:
    """A soft layer called "here" whose first token is no patch."""
    torch.manual_seed(0)
    router = SoftRouter(FEATURES, EXPERTS, slots)
    return SoftMoELayer(make_experts(), router, name="here", num_prefix_tokens=1).eval()


def plain_moe(experts: MLPExperts, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighted: (S, D) and weights (S, E) to (S, D)."""
    hidden = torch.einsum("sd,ehd->esh", tokens, experts.fc1.weights)
    hidden = hidden + experts.fc1.biases[:, None]
    outputs = torch.einsum("esh,edh->esd", nn.functional.gelu(hidden), experts.fc2.weights)
    outputs = outputs + experts.fc2.biases[:, None]
    return torch.einsum("se,esd->sd", weights, outputs)
