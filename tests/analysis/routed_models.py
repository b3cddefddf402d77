"""A small token-choice model and hand-made inputs of an analysis, for tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import Tiny
from torch import Tensor, nn

from backdoorbench_moe.attacks import create_attack
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing


class TokenChoice(RoutedModel):
    """Two routed layers in which each 8x8 patch chooses its best two of three experts.

    The first expert of the second layer takes nothing, so that some patches go to a single expert.
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
    """Draw a white 6x6 square in the upper left corner. It touches four patches of 4x4 pixels, or one of 8x8."""
    out = images.clone()
    out[:, :, :6, :6] = 1
    return out


def open_with_model(model: nn.Module, **values: Any) -> OpenedRun:
    """Make an opened run of the tiny data set and a model, with the parts that a pass needs."""
    run: Any = SimpleNamespace(spec=SimpleNamespace(seed=0))
    images = Tiny(**values).load()
    return OpenedRun(run, model.eval(), images, stamp, torch.device("cpu"), "fp32")  # type: ignore[arg-type]


def make_triggered(opened: OpenedRun) -> Triggered:
    """Return the triggered images that count for ASR with target 0."""
    return triggered_test(opened.images, create_attack("data-poisoning"), stamp)
