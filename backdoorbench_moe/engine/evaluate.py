"""Measuring a trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.step import as_input

BATCH = 500


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, *, precision: str, batch_size: int = BATCH) -> Tensor:
    """Predicted classes (N,) int64 of (N, C, H, W) uint8 images, in evaluation mode, on their device."""
    model.eval()
    predicted = torch.empty(len(images), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        with autocast(images.device, precision):
            predicted[part] = model(as_input(images[part])).argmax(1)
    return predicted


def count_hits(model: nn.Module, split: Split, *, precision: str) -> int:
    """How many images of the split are predicted as labelled."""
    return int((predict(model, split.images, precision=precision) == split.labels).sum())
