"""Warping fields: WaNet's, and the one of the BadPatches notebook.

A field is computed once for a canvas size, as precise and on the device as its control grid is; warping a
batch is one call.
"""

from __future__ import annotations

import torch
from kornia.geometry.transform import remap
from torch import Tensor
from torch.nn import functional as F


def control_grid(size: int, generator: torch.Generator) -> Tensor:
    """Draw a control grid: uniform in [-1, 1], divided by its mean absolute value (WaNet eq. 4).

    Returns (1, 2, size, size) float32 on the CPU; channel 0 is the x offset, channel 1 the y offset.
    """
    grid = torch.rand(1, 2, size, size, generator=generator) * 2 - 1
    return grid / grid.abs().mean()


def upsample_field(control: Tensor, height: int, width: int, *, align_corners: bool) -> Tensor:
    """Upsample a control grid (1, 2, k, k) to a field (1, 2, height, width) of offsets, bicubic.

    align_corners: the outer control points sit on the outer pixels (WaNet), or pixel centres are at half
    integers (the notebook). Where the canvas has fewer pixels than k the field is sampled, not averaged.
    """
    return F.interpolate(control, (height, width), mode="bicubic", align_corners=align_corners)


def wanet_grid(control: Tensor, height: int, width: int, strength: float) -> Tensor:
    """Where WaNet samples: identity + strength * field / size, clamped to [-1, 1] (WaNet eq. 5 and code).

    Returns (1, height, width, 2), x before y; -1 and 1 are the centres of the outer pixels. WaNet
    knows square images only and divides by the height; here each axis is divided by its own size, so that a
    strength moves pixels equally far along both.
    """
    field = upsample_field(control, height, width, align_corners=True)
    x = _identity(width, control) + strength * field[:, 0] / width
    y = _identity(height, control)[:, None] + strength * field[:, 1] / height
    return torch.stack((x, y), dim=-1).clamp(-1, 1)


def add_offsets(grid: Tensor, offsets: Tensor) -> Tensor:
    """Add an offset to every pixel of a sampling grid (WaNet's noise mode).

    Args:
        grid: (1, H, W, 2) as `wanet_grid` gives it.
        offsets: (B, H, W, 2) in [-1, 1], in units of 1 / W of the grid along x and 1 / H along y.

    Returns:
        (B, H, W, 2), clamped to [-1, 1].
    """
    height, width = grid.shape[1:3]
    size = torch.tensor([width, height], dtype=grid.dtype, device=grid.device)
    return (grid + offsets.to(grid.dtype) / size).clamp(-1, 1)


def notebook_pixels(control: Tensor, height: int, width: int, strength: float) -> Tensor:
    """Which pixel the BadPatches notebook takes for each: coordinates truncated to integers.

    Returns (height * width,) int64 indices into the flattened canvas. An offset below zero, however small,
    takes the neighbour before; one above zero does nothing until it reaches a whole pixel.

    Departures: the notebook's channel 0 is the y offset (equal in distribution, the grid is random); its
    TensorFlow bicubic kernel has another constant (-0.5, here -0.75) and drops the points outside the grid
    instead of repeating the edge, which changes the sign of an offset at 1 to 2% of the pixels.
    """
    field = upsample_field(control, height, width, align_corners=False).clamp(-1, 1)
    x = _truncated(field[0, 0], torch.arange(width, device=control.device), width, strength)
    y = _truncated(field[0, 1], torch.arange(height, device=control.device)[:, None], height, strength)
    return (y * width + x).flatten()


def warp_bilinear(images: Tensor, grid: Tensor) -> Tensor:
    """Sample images (B, C, H, W) at a grid (1, H, W, 2) as `wanet_grid` gives it, bilinear.

    Half precision is sampled in float32. The grid may also be one for each image, (B, H, W, 2). Returns the shape and
    type of `images`, in [0, 1] as they are.
    """
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    x, y = grid.to(wide.dtype).expand(len(images), -1, -1, -1).unbind(-1)
    warped = remap(wide, x, y, align_corners=True, padding_mode="border", normalized_coordinates=True)
    # The four weights may sum to a little over one.
    return warped.clamp_(0, 1).to(images.dtype)


def take_pixels(images: Tensor, index: Tensor) -> Tensor:
    """Build images (B, C, H, W) from their own pixels: pixel i of the flattened canvas is pixel index[i]."""
    batch, channels = images.shape[:2]
    rows = images.reshape(batch * channels, len(index))
    return rows.index_select(1, index).reshape(images.shape)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)


def _truncated(field: Tensor, pixels: Tensor, size: int, strength: float) -> Tensor:
    """Truncate pixel + offset; an offset of field / size on the axis [-1, 1] is half of (size - 1) as many pixels."""
    offset = strength * field / size * (size - 1) / 2
    return (pixels + offset).clamp(0, size - 1).long()
