"""Routed models and their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """The routing of a batch in one routed layer. For texts, the patches are positions.

    Attributes:
        layer: Dotted name of the layer's module.
        gates: (B, E, P) float in [0, 1], the router's weights before selection.
        selected: (B, E, P) bool, the patches that each expert processed.
        aux_loss: Scalar that is added to the loss in training, such as a load-balancing loss, or None.
    """

    layer: str
    gates: Tensor
    selected: Tensor
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class RoutedOutput:
    """Output of a routed model.

    Attributes:
        logits: (B, classes), or (B, T, vocabulary) for texts.
        routing: One entry for each routed layer, in the order of the layers.
    """

    logits: Tensor
    routing: list[Routing]


class RoutedModel(nn.Module, ABC):
    """Base class of models that send patches to experts and report the routing.

    Subclasses implement `forward_routed` and set the attributes. A language model maps token ids (B, T) to logits
    (B, T, vocabulary), routes positions instead of patches, and does not set the attributes.

    Attributes:
        patch_grid: Rows and columns of patches. The P = rows * columns patches are numbered row by row.
        patch_size: Side in pixels of the image tile that belongs to a patch.
    """

    patch_grid: tuple[int, int]
    patch_size: int

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.forward_routed(images).logits

    @abstractmethod
    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Map images (B, 3, H, W) in [0, 1] to logits and the routing of every routed layer."""


def undeclared_routing(kind: type) -> str | None:
    """Return why a class of models counts as dense although it has `forward_routed`, or None if it does not."""
    if issubclass(kind, RoutedModel) or not callable(getattr(kind, "forward_routed", None)):
        return None
    return (
        f"{kind.__name__} has forward_routed, but is not a RoutedModel: derive it from "
        "backdoorbench_moe.RoutedModel, or rename the method if the model is not routed"
    )


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Routing]]:
    """Return the logits (B, classes) of images (B, 3, H, W), and the routing of every routed layer, if any."""
    if not isinstance(model, RoutedModel):
        return model(images), []
    output = model.forward_routed(images)
    return output.logits, output.routing


def auxiliary_loss(routing: Sequence[Routing]) -> Tensor | float:
    """Return the sum of the auxiliary losses of routed layers, a scalar; 0 if there are none."""
    own = [each.aux_loss for each in routing if each.aux_loss is not None]
    return torch.stack(own).sum() if own else 0.0
