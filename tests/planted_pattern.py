"""A linear model with a faint pattern that leads to class 0, made by hand, for tests of defenses that tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.ops.images import Split


class Linear(nn.Module):
    """A linear model of images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 3)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 8, 8) to (B, 3)."""
        return self.head(images.flatten(1))


def planted(form: str) -> tuple[Linear, Tensor, Split]:
    """A model of three colours, and a faint pattern that leads to class 0; for "patch" it is the same in every tile."""
    draws, model = torch.Generator().manual_seed(0), Linear()
    side, times = (4, 2) if form == "patch" else (8, 1)
    tile = torch.randn(3, side, side, generator=draws)
    pattern = F.normalize((tile - tile.mean((1, 2), keepdim=True)).repeat(1, times, times).flatten(), dim=0)
    labels = torch.arange(120) % 3
    images = torch.randint(60, 120, (120, 3, 8, 8), generator=draws, dtype=torch.uint8)
    images[torch.arange(120), labels] += 60
    with torch.no_grad():
        model.head.bias.zero_()
        for colour in range(3):
            model.head.weight[colour] = 0.1 * F.one_hot(torch.tensor(colour), 3).repeat_interleave(64)
        model.head.weight[0] += 2 * pattern
    return model.eval(), pattern.reshape(3, 8, 8), Split(images, labels)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()
