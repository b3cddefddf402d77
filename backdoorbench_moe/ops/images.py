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
        """The same images in memory of their own."""
        return Split(self.images.clone(), self.labels.clone())

    def to(self, device: torch.device | str) -> Split:
        """The same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))
