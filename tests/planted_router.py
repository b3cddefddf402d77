"""A routed model whose router is made by hand: one expert reacts to a pattern that clean images do not have."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.moe.layers.assignment import top_experts
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import Expert
from backdoorbench_moe.ops.patches import tile

EXPERTS, PLANTED, PATCH, SIDE = 4, 2, 4, 16
# Single pixels of three colours that the planted expert reacts to: (3, 4, 4), 1 where it wants more and -1 where less.
PLANT = torch.zeros(3, PATCH, PATCH)
PLANT[0, 1, 1], PLANT[1, 2, 2], PLANT[:, 1, 2] = 1, 1, -1


class PlantedRouter(RoutedModel):
    """A linear router on the pixels of patches, without experts; the logits are the mean colours.

    Each expert but the planted one prefers its own colour, summed over the patch.

    Args:
        choice: "experts" if each patch chooses two experts, "patches" if each expert chooses four patches.
        strength: How much stronger the planted expert reacts to a pixel of its pattern than others to one of theirs.
        layers: Number of routed layers; only the first one is planted.
    """

    def __init__(
        self, choice: Literal["experts", "patches"] = "experts", *, strength: float = 12.0, layers: int = 1
    ) -> None:
        super().__init__()
        self.choice, self.patch_grid, self.patch_size = choice, (SIDE // PATCH,) * 2, PATCH
        self.routers = nn.ParameterList()
        colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.6, 0.6, 0], [0, 0, 1]])
        for layer in range(layers):
            rows = colours[..., None, None].repeat(1, 1, PATCH, PATCH)
            if layer == 0 and strength:
                rows[PLANTED] = strength * PLANT
            self.routers.append(nn.Parameter(rows.flatten(1)))
        self.head = nn.Linear(3, 3)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        patches = tile(images, PATCH).flatten(1).unflatten(0, (len(images), -1))
        routing = []
        for number, rows in enumerate(self.routers):
            logits = patches @ rows.T
            chosen_over = 2 if self.choice == "experts" else 1
            gates = logits.softmax(chosen_over).transpose(1, 2)
            flat = logits.flatten(0, 1) if self.choice == "experts" else logits.transpose(1, 2).flatten(0, 1)
            chosen = top_experts(flat, 1 if self.choice == "experts" else 4)
            selected = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True)
            selected = selected.view(len(images), -1, flat.shape[1])
            if self.choice == "experts":
                selected = selected.transpose(1, 2)
            routing.append(Routing(f"layer{number}", gates, selected))
        return RoutedOutput(self.head(images.mean((2, 3))), routing)

    def experts(self) -> list[Expert]:
        return [
            Expert(f"layer{layer}", e, {}, {}, self.head, (e, e + 1))
            for layer in range(len(self.routers))
            for e in range(EXPERTS)
        ]


def smooth_images(count: int, seed: int = 0) -> Split:
    """Images whose patches of 4x4 each have one colour of their own, with a little noise, (count, 3, 16, 16) uint8."""
    draws = torch.Generator().manual_seed(seed)
    colours = torch.randint(40, 200, (count, 3, 4, 4), generator=draws).float()
    noise = 4 * torch.randn(count, 3, SIDE, SIDE, generator=draws)
    images = (colours.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3) + noise).clamp(0, 255)
    return Split(images.byte(), torch.arange(count) % 3)
