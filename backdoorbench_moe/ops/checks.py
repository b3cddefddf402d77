"""Checks of image tensors from callers and plug-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backdoorbench_moe.errors import PluginError, ShapeError

# In half precision, bilinear weights may sum to slightly more than one.
TOLERANCE = 1e-2


def check_image_batch(images: object, name: str, *, like: Tensor | None = None, wait: bool = False) -> None:
    """Check a batch of float images.

    By default, the range is checked on the CPU only, because on an accelerator every step would have to wait for the
    device.

    Args:
        images: Expected to be (B, C, H, W) float in [0, 1].
        name: Name of the images in the error message.
        like: Tensor of the expected shape, type and device, if they are known.
        wait: Whether to check the range on an accelerator, too.

    Raises:
        ShapeError: The images have a wrong shape, type, device or range.
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
    if (wait or images.device.type == "cpu") and images.numel():
        low, high = (value.item() for value in torch.aminmax(images.detach()))
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ShapeError(f"{name}: expected values in [0, 1], got {low:g} to {high:g}")


@contextmanager
def unwritten(images: Tensor, name: str) -> Iterator[None]:
    """Check that a part does not write into its input, as its caller may use the images again.

    Args:
        images: The input. Writes are counted by torch, except into tensors of `torch.inference_mode`.
        name: The part, in the error message.

    Raises:
        PluginError: The part wrote into the images.
    """
    counted = not images.is_inference()
    before = images._version if counted else 0
    yield
    if counted and images._version != before:
        raise PluginError(
            f"{name}: writes into its input; expected a changed copy, such as of images.clone()"
        )
