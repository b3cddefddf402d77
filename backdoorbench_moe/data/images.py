"""Decoding and resizing, shared by the data sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_moe.errors import ConfigError

RESIZE_CHUNK = 1024


def check_image_size(image_size: int) -> int:
    """Return `image_size` if it is a side in pixels. Raises ConfigError."""
    if image_size < 1:
        raise ConfigError.expected("dataset: image_size", "a positive number of pixels", image_size)
    return image_size


def resize(images: Tensor, size: int) -> Tensor:
    """Resize a uint8 batch (N, 3, H, W) to (N, 3, size, size): bilinear, antialiased.

    Returns `images` itself where it has that size. The aspect ratio is not kept.
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = torch.empty(len(images), images.shape[1], size, size, dtype=torch.uint8)
    for start in range(0, len(images), RESIZE_CHUNK):  # Chunks keep the temporaries small.
        part = images[start : start + RESIZE_CHUNK]
        resized[start : start + RESIZE_CHUNK] = F.interpolate(
            part, (size, size), mode="bilinear", antialias=True
        )
    return resized
