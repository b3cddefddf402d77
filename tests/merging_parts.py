"""Small dense models, experts tuned from them at random, and routers whose weights sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.layers import LinearRouter, Router, RouterOutput, assign_chosen, top_experts
from backdoorbench_moe.moe.merging import MergedModel, expert_names, load_experts
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import settle

DENSE: dict[str, dict[str, object]] = {
    "convnext": {"features": 16, "depth": 2},
    "timm:vit_tiny_patch16_224": {"depth": 2, "embed_dim": 16, "num_heads": 2},
}


class Renormalised(LinearRouter):
    """Each token goes to the `top_k` experts with the largest logits, weighted by a softmax over these alone."""

    def __init__(self, features: int, num_experts: int, top_k: int, gate_std: float = 1.0) -> None:
        super().__init__(features, num_experts, gate_std=gate_std)
        self.top_k = top_k

    def choose(self, logits: Tensor) -> RouterOutput:
        images, tokens, _ = logits.shape
        flat = logits.flatten(0, 1)
        chosen = top_experts(flat, self.top_k)
        kept = ~self.masked[chosen]
        weights = torch.zeros_like(flat).scatter(1, chosen, flat.gather(1, chosen).softmax(1))
        selected = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, kept)
        return RouterOutput(
            weights.unflatten(0, (images, tokens)),
            selected.unflatten(0, (images, tokens)),
            assign_chosen(weights, chosen, kept, len(flat)),
        )


def images(count: int = 4) -> Tensor:
    """Draw images, (count, 3, 32, 32); always the same."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def top(count: int, gate_std: float = 1.0):
    """A function that builds routers for at most `count` experts a token."""

    def build(features: int, num_experts: int) -> Router:
        return Renormalised(features, num_experts, min(count, num_experts), gate_std)

    return build


def make_dense(name: str = "convnext", *, seed: int = 0, **options: object) -> nn.Module:
    """A small dense model of three classes, in evaluation mode. Its biases are not zero."""
    with seeded(seed, "init"):
        model = create_model(name, num_classes=3, **{**DENSE.get(name, {}), **options})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(len(parameter)))
    return settle(model)


def tuned(base: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state dict of an expert: that of the base with other MLPs."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in sorted(expert_names(base)):
        state[name] += 0.1 * torch.randn(state[name].shape, generator=generator)
    return state


def make_merged(
    name: str = "convnext", *, experts: int = 3, top_k: int = 2, seed: int = 0
) -> tuple[MergedModel, nn.Module, list[dict[str, Tensor]]]:
    """A mixture in evaluation mode, its base, and the state dicts of its experts, all drawn from the seed."""
    base = make_dense(name, seed=seed)
    states = [tuned(base, 100 * seed + number) for number in range(1, experts + 1)]
    with seeded(seed, "gates"):
        merged = MergedModel(base, experts, top(top_k))
    load_experts(merged, base.state_dict(), states)
    return merged, base, states
