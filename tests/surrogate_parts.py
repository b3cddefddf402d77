"""Surrogates whose best trigger is known, and tasks for triggers that are optimised on them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.engine.makers.surrogate import cut_with_places
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.patches import tile
from backdoorbench_moe.triggers.optimised import SurrogateTask

SIDE, PATCH = 8, 4


class Linear(nn.Module):
    """Logits that are linear in the pixels; the features are sums of pixels, and the head is linear in them."""

    def __init__(self, classes: int = 2, features: int = 5, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(features, 3 * SIDE * SIDE, generator=draw) / 10)
        self.last = nn.Parameter(torch.randn(classes, features, generator=draw))

    def extract_features(self, images: Tensor) -> Tensor:
        """(B, features)."""
        return images.flatten(1) @ self.first.T

    def classify(self, features: Tensor) -> Tensor:
        """(B, classes)."""
        return features @ self.last.T + 1

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def weights(self) -> Tensor:
        """What each pixel adds to each logit, (classes, 3, SIDE, SIDE)."""
        return (self.last @ self.first).detach().view(-1, 3, SIDE, SIDE)


class Routers(RoutedModel):
    """One router that is linear in the pixels of each patch: of experts that choose, or of patches that choose."""

    def __init__(self, weights: Tensor, *, patches_choose: bool = False, top_k: int = 1) -> None:
        super().__init__()
        self.patch_size, self.patch_grid = PATCH, (SIDE // PATCH, SIDE // PATCH)
        self.weights, self.patches_choose, self.top_k = nn.Parameter(weights), patches_choose, top_k

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """weights: (E, 3 * PATCH * PATCH)."""
        patches = tile(images.contiguous(), PATCH).flatten(1).unflatten(0, (len(images), -1))
        logits = (patches @ self.weights.T).transpose(1, 2)
        axis = 1 if self.patches_choose else 2
        gates = logits.softmax(axis)
        best = gates.detach().topk(self.top_k, dim=axis).indices
        selected = torch.zeros_like(gates, dtype=torch.bool).scatter_(axis, best, True)
        return RoutedOutput(logits.sum((1, 2))[:, None].expand(-1, 2), [Routing("only", gates, selected)])


def make_images(count: int = 24) -> Tensor:
    """(count, 3, SIDE, SIDE) uint8, away from black and white so that small changes are not clipped."""
    return torch.randint(80, 180, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).byte()


def surrogate_task(model: nn.Module, applicator: str = "image", target: int | None = 0) -> SurrogateTask:
    """A task with two classes in turn, in which every fourth image of class 0 is poisoned."""
    options = {"patch_size": PATCH} if applicator == "patch" else {}
    applied = create_applicator(applicator, **options)
    images = make_images()
    return SurrogateTask(
        model=model.eval().requires_grad_(False),
        images=images,
        labels=torch.arange(len(images)) % 2,
        stamped=torch.arange(0, len(images), 4),
        target=target,
        stamp=applied,
        cut=partial(cut_with_places, applied),
    )
