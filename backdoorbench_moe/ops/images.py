"""Labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, class numbers from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def copy(self) -> Split:
        """Return a copy that does not share memory."""
        return Split(self.images.clone(), self.labels.clone())

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


def as_input(images: Tensor) -> Tensor:
    """Return (B, C, H, W) uint8 images as float32 in [0, 1], channels last: the input of every model."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)
