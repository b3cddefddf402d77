"""How visible a change to an image is."""

from __future__ import annotations

import torch
from kornia import metrics
from torch import Tensor

from backdoorbench_moe.errors import ShapeError

WINDOW = 11


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each pair, in dB.

    Args:
        images: (B, C, H, W) in [0, 1].
        others: (B, C, H, W) in [0, 1], the images to compare with.

    Returns:
        (B,) float32 or float64; infinite for two equal images.

    Raises:
        ShapeError: The shapes differ.
    """
    images, others = _pair(images, others)
    if not len(images):
        return images.new_zeros(0)
    # kornia's psnr returns one value for the batch; vmap passes it one pair at a time.
    return torch.vmap(lambda a, b: metrics.psnr(a, b, 1.0))(images, others)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Compute the structural similarity of each pair, averaged over its pixels.

    The Gaussian window has 11x11 pixels. For smaller images it is the largest window of odd size for which the border
    can be padded by reflection.

    Args:
        images: (B, C, H, W) in [0, 1].
        others: (B, C, H, W) in [0, 1], the images to compare with.

    Returns:
        (B,) float32 or float64, at most 1.

    Raises:
        ShapeError: The shapes differ.

    Source:
        Wang et al., "Image quality assessment", IEEE Transactions on Image Processing 13 (2004).
    """
    images, others = _pair(images, others)
    side = min(images.shape[-2:])
    window = min(WINDOW, 2 * side - 1)
    return metrics.ssim(images, others, window).flatten(1).mean(1)


def _pair(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != others.shape or images.ndim != 4:
        raise ShapeError(
            f"others: expected (B, C, H, W) as images {tuple(images.shape)}, got {tuple(others.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(images.dtype, others.dtype), torch.float32)
    return images.to(dtype), others.to(dtype)
