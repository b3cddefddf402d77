"""A routed model of two layers whose tokens choose their expert, as a third party might write it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import Expert


class Layer(nn.Module):
    """Every one of the 4 patches goes to the expert that weighs it most; each expert adds its own vector."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(weights).log())
        self.vectors = nn.Parameter(torch.ones(len(weights), 3))


class Layered(RoutedModel):
    """Two layers of three experts, whose gates are the same for all patches of all images: those given."""

    patch_grid, patch_size = (2, 2), 16

    def __init__(self, *layers: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, layers))
        self.head = nn.Linear(3, 3)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Route."""
        found, total = [], torch.zeros(len(images), 3)
        for number, layer in enumerate(self.layers):
            gates = layer.bias.softmax(0).expand(len(images), 4, -1).transpose(1, 2).clone()
            selected = torch.zeros_like(gates, dtype=torch.bool).scatter_(
                1, gates.argmax(1, keepdim=True), True
            )
            found.append(Routing(f"layers/{number}", gates, selected))
            total = total + torch.einsum("bep,ed->bd", gates * selected, layer.vectors)
        return RoutedOutput(self.head(total), found)

    def experts(self) -> list[Expert]:
        """Each expert is its vector."""
        return [
            Expert(f"layers/{n}", e, rows, rows, layer, (e, e + 1))
            for n, layer in enumerate(self.layers)
            for e in range(len(layer.bias))
            for rows in [{f"layers.{n}.vectors": (e, e + 1)}]
        ]


class Masking(Layered):
    """The same, and its router can pass an expert over."""

    def mask_expert(self, expert: Expert) -> None:
        """Give it no chance."""
        with torch.no_grad():
            self.layers[int(expert.layer[-1])].bias[expert.index] = -torch.inf
