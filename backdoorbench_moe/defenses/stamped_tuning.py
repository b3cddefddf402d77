"""Tuning on images some of which are stamped and keep their true labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.losses import training_loss
from backdoorbench_moe.moe.routed import forward
from backdoorbench_moe.ops.tuning import Objective

# From images (B, 3, H, W) in [0, 1] to stamped ones; it may draw from torch's global generator.
Stamp = Callable[[Tensor], Tensor]


def stamped_objective(stamp: Stamp, share: float, label_smoothing: float = 0.0) -> Objective:
    """Return the usual loss (cross-entropy and the routed layers' auxiliary losses) on partly stamped batches.

    The order of the images is random, so the first images of a batch, which are stamped, are a random sample.

    Args:
        stamp: Function that stamps images.
        share: Share of each batch that is stamped, in (0, 1]; the number is rounded to the nearest integer.
        label_smoothing: Label smoothing of the recipe, see `training_loss`.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = round(share * len(images))
        if count:
            images = torch.cat([stamp(images[:count]), images[count:]])
            images = images.contiguous(memory_format=torch.channels_last)
        logits, routing = forward(model, images)
        return logits, training_loss(logits, routing, labels, label_smoothing=label_smoothing)

    return objective
