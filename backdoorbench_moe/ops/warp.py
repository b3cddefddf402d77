"""Warping fields of WaNet and of the BadPatches notebook.

A field depends only on the image size. It has the precision and the device of its control grid.
"""

from __future__ import annotations

import torch
from kornia.geometry.transform import remap
from torch import Tensor
from torch.nn import functional as F


def control_grid(size: int, generator: torch.Generator) -> Tensor:
    """Draw a control grid: uniform in [-1, 1], divided by its mean absolute value.

    Args:
        size: Side k of the grid.
        generator: Generator of the draw, on the CPU.

    Returns:
        (1, 2, k, k) float32 on the CPU. Channel 0 holds the x offsets, channel 1 the y offsets.

    Source:
        WaNet, equation 4.
    """
    # The type is explicit, because another default type would draw other numbers.
    grid = torch.rand(1, 2, size, size, generator=generator, dtype=torch.float32) * 2 - 1
    return grid / grid.abs().mean()


def upsample_field(control: Tensor, height: int, width: int, *, align_corners: bool) -> Tensor:
    """Upsample a control grid to a field of offsets with bicubic interpolation.

    Args:
        control: (1, 2, k, k). If the image has fewer than k pixels along an axis, the grid is subsampled without
            averaging.
        height: H, the height of the images.
        width: W, the width of the images.
        align_corners: True places the outer control points at the centres of the outer pixels, as in WaNet; False
            places the centres of pixels at half integers, as in the notebook.

    Returns:
        (1, 2, H, W).
    """
    return F.interpolate(control, (height, width), mode="bicubic", align_corners=align_corners)


def wanet_grid(control: Tensor, height: int, width: int, strength: float) -> Tensor:
    """Compute WaNet's sampling grid: identity + strength * field / size, clamped to [-1, 1].

    Departure: WaNet's images are square, and it divides by the height. Here, each axis is divided by its own size, so
    that pixels move by the same distance along both axes.

    Args:
        control: (1, 2, k, k), see `control_grid`.
        height: H, the height of the images.
        width: W, the width of the images.
        strength: WaNet's s.

    Returns:
        (1, H, W, 2), the coordinates (x, y) at which each pixel is sampled; -1 and 1 are the centres of the outer
        pixels.

    Source:
        WaNet, equation 5, and its code.
    """
    field = upsample_field(control, height, width, align_corners=True)
    x = _identity(width, control) + strength * field[:, 0] / width
    y = _identity(height, control)[:, None] + strength * field[:, 1] / height
    return torch.stack((x, y), dim=-1).clamp(-1, 1)


def add_offsets(grid: Tensor, offsets: Tensor) -> Tensor:
    """Add an offset to every pixel of a sampling grid (WaNet's noise mode).

    Args:
        grid: (1, H, W, 2) as returned by `wanet_grid`.
        offsets: (B, H, W, 2) in [-1, 1]; they are divided by W along x and by H along y, so 1 is about half a pixel.

    Returns:
        (B, H, W, 2), clamped to [-1, 1].
    """
    height, width = grid.shape[1:3]
    size = torch.tensor([width, height], dtype=grid.dtype, device=grid.device)
    return (grid + offsets.to(grid.dtype) / size).clamp(-1, 1)


def notebook_pixels(control: Tensor, height: int, width: int, strength: float) -> Tensor:
    """Compute which pixel the BadPatches notebook samples for each pixel: coordinates are truncated to integers.

    A negative offset, however small, therefore samples the previous pixel, and a positive one has no effect below one
    pixel.

    Departures: channel 0 of the notebook's grid holds the y offsets, which have the same distribution. Its bicubic
    kernel, from TensorFlow, has the constant -0.5 (here -0.75) and drops points outside of the grid, while this one
    repeats the edge. This changes the sign of the offset at 1 to 2% of the pixels.

    Args:
        control: (1, 2, k, k), see `control_grid`.
        height: H, the height of the images.
        width: W, the width of the images.
        strength: Strength of the warp, as in `wanet_grid`.

    Returns:
        (H * W,) int64 indices into the flattened image.

    Source:
        The notebooks of BadPatches (arXiv 2505.01811).
    """
    field = upsample_field(control, height, width, align_corners=False).clamp(-1, 1)
    x = _truncated(field[0, 0], torch.arange(width, device=control.device), width, strength)
    y = _truncated(field[0, 1], torch.arange(height, device=control.device)[:, None], height, strength)
    return (y * width + x).flatten()


def warp_bilinear(images: Tensor, grid: Tensor) -> Tensor:
    """Sample images at a grid with bilinear interpolation; half precision is sampled in float32.

    Args:
        images: (B, C, H, W) in [0, 1].
        grid: (1, H, W, 2) as returned by `wanet_grid`, or (B, H, W, 2) with a grid for each image.

    Returns:
        (B, C, H, W) of the same type, in [0, 1].
    """
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    x, y = grid.to(wide.dtype).expand(len(images), -1, -1, -1).unbind(-1)
    warped = remap(wide, x, y, align_corners=True, padding_mode="border", normalized_coordinates=True)
    # The four bilinear weights may sum to slightly more than one.
    return warped.clamp_(0, 1).to(images.dtype)


def take_pixels(images: Tensor, index: Tensor) -> Tensor:
    """Rearrange the pixels of images.

    Args:
        images: (B, C, H, W).
        index: (H * W,) int64; pixel i of the flattened result is pixel index[i] of the image.

    Returns:
        (B, C, H, W).
    """
    batch, channels = images.shape[:2]
    rows = images.reshape(batch * channels, len(index))
    return rows.index_select(1, index).reshape(images.shape)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)


def _truncated(field: Tensor, pixels: Tensor, size: int, strength: float) -> Tensor:
    """Truncate pixel + offset to integers; a length of 1 on the axis [-1, 1] is (size - 1) / 2 pixels."""
    offset = strength * field / size * (size - 1) / 2
    return (pixels + offset).clamp(0, size - 1).long()
