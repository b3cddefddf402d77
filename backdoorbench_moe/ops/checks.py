"""Checks on image tensors at the public boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.errors import ShapeError

# Bilinear weights in half precision may sum to a little over one.
TOLERANCE = 1e-2


def check_image_batch(images: object, name: str, *, like: Tensor | None = None) -> None:
    """Check that `images` is a float batch (B, C, H, W) in [0, 1], and shaped, typed and placed as `like`.

    The range is read on the CPU only: on an accelerator it would make every step wait for the device.
    Raises ShapeError naming `name`, what was expected and what came.
    """
    if not isinstance(images, Tensor):
        raise ShapeError(
            f"{name}: expected a float tensor (B, C, H, W) in [0, 1], got {type(images).__name__}"
        )
    if images.ndim != 4 or not images.is_floating_point():
        raise ShapeError(
            f"{name}: expected a float tensor (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
        )
    if like is not None and (images.shape, images.dtype, images.device) != (
        like.shape,
        like.dtype,
        like.device,
    ):
        raise ShapeError(
            f"{name}: expected {like.dtype} {tuple(like.shape)} on {like.device} like its input, "
            f"got {images.dtype} {tuple(images.shape)} on {images.device}"
        )
    if images.device.type == "cpu" and images.numel():
        low, high = (value.item() for value in torch.aminmax(images.detach()))
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ShapeError(f"{name}: expected values in [0, 1], got {low:g} to {high:g}")
