"""Running a model on noise to inspect its structure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.temporary import evaluation_mode


@contextmanager
def noise_for(model: nn.Module, image_size: int, count: int = 2) -> Iterator[Tensor]:
    """Put a model in evaluation mode inside the block; see `evaluation_mode`.

    Args:
        model: The model, trained or not.
        image_size: Side of its square images in pixels.
        count: Number of images.

    Yields:
        (count, 3, image_size, image_size) uniform noise in [0, 1) on the device of the model, from a fixed seed.
    """
    noise = torch.rand(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with evaluation_mode(model):
        yield noise.to(next(model.parameters()).device)
