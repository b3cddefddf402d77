"""What a routed model returns, and the interface it keeps.

Any model, routed or not, may have a class attribute `tiny`: options that the conformance tests make it with, so
that it is small. Where gates choose, they should lie far apart, so that no rounding decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class StartsFromFile(Protocol):
    """A model whose training may begin with weights from a file that one of its options names; optional.

    Building it must not need the file: a trained model is built again long after, to be given its own weights.
    """

    def load_start(self) -> None:
        """Load these weights, in place; nothing where no file is named. Raises ConfigError, naming the option.

        Called before a victim is trained from its first step, maybe more than once.
        """
