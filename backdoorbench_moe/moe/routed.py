"""Routed models: what they return, and the interface they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What one routed layer did with a batch.

    layer: the module's dotted name. gates: (B, E, P) float, the router's weights before selection.
    selected: (B, E, P) bool, which patches each expert received. aux_loss: scalar added to the loss in
    training (load balancing), or None.
    """

    layer: str
    gates: Tensor
    selected: Tensor
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class RoutedOutput:
    """logits: (B, classes); routing: one entry for each routed layer, first layer first."""

    logits: Tensor
    routing: list[Routing]


class RoutedModel(nn.Module, ABC):
    """A model that sends patches to experts and says which.

    patch_grid: rows and columns of patches, P = rows * columns, row by row. patch_size: side in pixels of
    the image tile that a patch answers for.
    """

    patch_grid: tuple[int, int]
    patch_size: int

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.forward_routed(images).logits

    @abstractmethod
    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Images (B, 3, H, W) in [0, 1] to logits and the routing of every routed layer."""
