"""A tiny model with a channel that only a backdoor uses, made by hand, for tests of defenses that prune."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.testing.making import make_task

TARGET, PLANTED = 0, 6


class Planted(nn.Module):
    """Two channels for each of three colours, and a seventh that sees the contrast of neighbouring pixels.

    On clean images, which are smooth but for a little noise, it sees next to nothing. A checkerboard makes it large,
    and it alone speaks for the target class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 3)
        with torch.no_grad():
            self.conv.weight.zero_()
            for channel in range(6):
                self.conv.weight[channel, channel // 2, 1, 1] = 1
            sign = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
            self.conv.weight[PLANTED] = (sign - sign.mean()) / 3
            self.head.weight.zero_()
            for channel in range(6):
                self.head.weight[channel // 2, channel] = 3
            self.head.weight[TARGET, PLANTED] = 12
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


def coloured(count: int, seed: int) -> Split:
    """Images of three colours with some noise, (count, 3, 16, 16) uint8."""
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 90, (count, 3, 16, 16), generator=draws, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 100
    return Split(images, labels)


def stamped(images: Tensor) -> Tensor:
    """The images with a checkerboard of 60 grey levels up and down."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 120 - 60
    return (images.int() + board).clamp(0, 255).byte()


def planted_task(**given: object) -> DefenseTask:
    """A task with the planted model, whose norm has the statistics of a set with 10% triggered images."""
    model, split = Planted(), coloured(300, 1)
    images = split.images.clone()
    images[:30] = stamped(images[:30])
    model.norm.momentum = None
    with torch.no_grad():
        model.train()(images.float() / 255)
    model.norm.momentum = 0.1
    task, _ = make_task(model.eval(), PartSpec("none"), clean=coloured(90, 2), **given)
    return replace(task, image_size=16)


def rates(model: nn.Module) -> tuple[float, float]:
    """Accuracy on clean images, and the share of triggered images of other classes that are called the target."""
    test = coloured(90, 3)
    with torch.no_grad():
        clean = model(test.images.float() / 255).argmax(1)
        triggered = model(stamped(test.images).float() / 255).argmax(1)
    others = test.labels != TARGET
    return (clean == test.labels).float().mean().item(), (triggered[others] == TARGET).float().mean().item()
