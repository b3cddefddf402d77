"""A routed model of the other kind, and what an analysis is given, made by hand for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import Tiny
from torch import Tensor, nn

from backdoorbench_moe.analysis.subject import Subject
from backdoorbench_moe.attacks import create_attack
from backdoorbench_moe.engine.triggered import Triggered, triggered_test
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing


class TokenChoice(RoutedModel):
    """Two routed layers in which each 8x8 patch chooses its best two of three experts; one layer is capped.

    The second layer's first expert takes nothing, so that some patches go to one expert alone.
    """

    patch_grid, patch_size = (4, 4), 8

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.cut = nn.Conv2d(3, 6, 8, stride=8)
            self.routers = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
            self.head = nn.Linear(6, 3)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        routing = []
        for number, router in enumerate(self.routers):
            gates = (8 * router(tokens)).softmax(-1)
            best = torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, gates.topk(2).indices, True)
            if number == 1:
                best = best & torch.tensor([False, True, True])
            tokens = tokens * (1 + (gates * best).sum(-1, keepdim=True))
            routing.append(Routing(f"blocks.{number}", gates.transpose(1, 2), best.transpose(1, 2)))
        return RoutedOutput(self.head(tokens.mean(1)), routing)


def stamp(images: Tensor) -> Tensor:
    """A white 6x6 square, upper left: it lies in four patches of four pixels, and in one of eight."""
    out = images.clone()
    out[:, :, :6, :6] = 1
    return out


def make_subject(model: nn.Module, **values: Any) -> Subject:
    """The tiny data's images with a model, as far as a pass needs it."""
    run: Any = SimpleNamespace(spec=SimpleNamespace(seed=0))
    images = Tiny(**values).load()
    return Subject(run, model.eval(), images, stamp, torch.device("cpu"), "fp32")  # type: ignore[arg-type]


def make_triggered(subject: Subject) -> Triggered:
    """The images that count for ASR, triggered, with target 0."""
    return triggered_test(subject.images, create_attack("data-poisoning"), stamp)
