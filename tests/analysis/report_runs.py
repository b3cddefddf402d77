"""Analyses of small finished runs, for tests of figures and reports: made once, as plain documents."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny import TINY_MODEL, Tiny, tiny_spec
from torch import Tensor, nn

from backdoorbench_moe import data, models
from backdoorbench_moe.analysis.analyze import analyze_run
from backdoorbench_moe.analysis.document import as_document
from backdoorbench_moe.analysis.results import Analysis
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import Expert


class Deep(RoutedModel):
    """A token-choice model of more routed layers than patch maps show: 5, of 4 experts and 256 patches."""

    patch_grid, patch_size = (16, 16), 2

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        assert image_size == 32
        self.cut = nn.Conv2d(3, 4, 2, stride=2)
        self.routers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.head = nn.Linear(4, num_classes)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        routing = []
        for number, router in enumerate(self.routers):
            gates = (8 * router(tokens)).softmax(-1)
            best = torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, gates.topk(2).indices, True)
            tokens = tokens * (1 + (gates * best).sum(-1, keepdim=True)) / 2
            name = f"blocks.{number}.moe"
            routing.append(Routing(name, gates.transpose(1, 2), best.transpose(1, 2)))
        return RoutedOutput(self.head(tokens.mean(1)), routing)

    def experts(self) -> list[Expert]:
        """Rows of the head stand in for what an expert would own."""
        return [
            Expert(f"blocks.{n}.moe", e, {}, {"head.weight": (e % 3, e % 3 + 1)}, self.cut, (0, 4))
            for n in range(5)
            for e in range(4)
        ]


SPECS: dict[str, dict[str, Any]] = {
    "pmoe": {"probe": 5},
    "deep": {"model": "deep", "train": {"epochs": 1, "batch_size": 32, "lr": 0.1}, "probe": 2},
    "two experts": {"model": {**TINY_MODEL, "num_experts": 2}, "probe": 3},
    "one expert": {"model": {**TINY_MODEL, "num_experts": 1}, "probe": 2},
    # Every expert takes every patch: no image is missed, and nothing can be compared.
    "all patches": {
        "model": {**TINY_MODEL, "num_experts": 2, "top_k": 64},
        "train": {"epochs": 1, "batch_size": 32},
    },
    # A trigger of one pixel and one patch an expert: it may be that no image is captured.
    "one patch": {
        "model": {**TINY_MODEL, "num_experts": 2, "top_k": 1},
        "trigger": {"name": "square", "size": 1},
        "train": {"epochs": 1, "batch_size": 32},
    },
    "dense": {"model": {"name": "wide_resnet", "widen_factor": 1}},
}


@functools.cache
def document_of(kind: str) -> dict[str, Any]:
    """The document of a backdoored run beside its clean twin; `kind` names one of SPECS. Do not change it."""
    return as_document(analysis_of(kind))


@functools.cache
def analysis_of(kind: str) -> Analysis:
    """The analysis that `document_of` is made from."""
    known = {"tiny": (data.registry, Tiny), "deep": (models.registry, Deep)}
    added = [
        (registry, name, part) for name, (registry, part) in known.items() if name not in registry.names()
    ]
    for registry, name, part in added:
        registry.register(name)(part)
    try:
        with tempfile.TemporaryDirectory() as folder:
            [run] = run_attack(tiny_spec(**SPECS[kind]), output=Path(folder))
            return analyze_run(run, carriers_images=20)
    finally:
        for registry, name, _ in added:
            registry.unregister(name)
