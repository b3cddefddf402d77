"""The loss of plain tuning and its parts, for defenses that change it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.moe.routed import RoutedModel, Routing


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


def training_loss(
    logits: Tensor, routing: Sequence[Routing], labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy plus the auxiliary losses of routed layers: what `Tune` minimises by default.

    Args:
        logits: (B, classes).
        routing: The routing of every routed layer.
        labels: (B,) int64.
        label_smoothing: Share of the target that is distributed equally to all classes, in [0, 1].

    Returns:
        A scalar.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return loss + auxiliary_loss(routing)
