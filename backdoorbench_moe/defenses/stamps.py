"""Stamps that a defender applies to the full image or to all of its tiles.

A stamp is a tensor of *values*, (channels, h, w), for a canvas of h x w pixels: the full image, or a tile, in which
case all tiles of the image get the same stamp. Functions here take K stamps at a time, (K, channels, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.structure import DEFAULT_PATCH_SIZE, patch_size_of
from backdoorbench_moe.ops.patches import tile, untile

ApplicatorName = Literal["image", "patch"]

# From canvases (N, 3, h, w) in [0, 1] and the values of K stamps to the stamped canvases, (K, N, 3, h, w) in [0, 1].
Stamp = Callable[[Tensor, Tensor], Tensor]


def blend_pattern(canvases: Tensor, values: Tensor) -> Tensor:
    """Blend a pattern into canvases: (1 - mask) * canvas + mask * pattern.

    Args:
        canvases: (N, 3, h, w) in [0, 1].
        values: (K, 4, h, w) in [0, 1]: the mask, then the pattern.

    Returns:
        (K, N, 3, h, w) in [0, 1].
    """
    mask, pattern = values.unsqueeze(1).split((1, 3), dim=2)
    return torch.lerp(canvases, pattern, mask)


def add_pattern(canvases: Tensor, values: Tensor) -> Tensor:
    """Add a pattern to canvases, and clamp the result.

    Args:
        canvases: (N, 3, h, w) in [0, 1].
        values: (K, 3, h, w), the patterns.

    Returns:
        (K, N, 3, h, w) in [0, 1].
    """
    return (canvases + values.unsqueeze(1)).clamp(0, 1)


def displace_pixels(canvases: Tensor, values: Tensor) -> Tensor:
    """Sample each pixel at a displaced position, with bilinear interpolation; positions are clamped to the canvas.

    Args:
        canvases: (N, 3, h, w) in [0, 1].
        values: (K, 2, h, w), displacements in pixels along y, then along x.

    Returns:
        (K, N, 3, h, w) in [0, 1].
    """
    height, width = canvases.shape[-2:]
    rows, columns = (torch.arange(n, device=canvases.device) for n in (height, width))
    down, right = values.unbind(1)
    y, x = (rows[:, None] + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)
    flat = canvases.flatten(2)
    top, left = _first(y, height), _first(x, width)
    moved = torch.zeros((), device=canvases.device)
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            # In a canvas of one row or column, the second one does not exist and has the weight 0.
            index = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
            moved = moved + flat[:, :, index].movedim(2, 0) * weight[:, None, None]
    return moved.clamp(0, 1)


def _first(at: Tensor, size: int) -> Tensor:
    """Return the index of the first of the two pixels that a position lies between; the second is one higher."""
    return at.floor().long().clamp(0, max(0, size - 2))


def check_patch_size(applicator: ApplicatorName, patch_size: int | None) -> None:
    """Raise ConfigError if a side of tiles is given for the applicator "image", or is not a positive number."""
    if patch_size is None:
        return
    if applicator == "image":
        raise ConfigError.expected("patch_size", "none for the applicator image", patch_size)
    if patch_size < 1:
        raise ConfigError.expected("patch_size", "a positive number of pixels", patch_size)


def canvas_side(
    applicator: ApplicatorName, patch_size: int | None, model: nn.Module, image_size: int
) -> int | None:
    """Return the side of the tiles in pixels; None if the stamp covers the full image.

    Args:
        applicator: "image" or "patch".
        patch_size: The side that the user asks for. None: that of the model's patches, or 4 for a model without
            patches.
        model: The model.
        image_size: Side of the square images in pixels.

    Raises:
        ConfigError: The tiles do not cover the images.
    """
    if applicator == "image":
        return None
    own = patch_size_of(model)
    side = (DEFAULT_PATCH_SIZE if own is None else own) if patch_size is None else patch_size
    if image_size % side:
        raise ConfigError.expected("patch_size", f"a divisor of the image's {image_size} pixels", side)
    return side


def canvas_shape(images: Tensor, side: int | None) -> tuple[int, int]:
    """Return height and width of the canvas in images (B, 3, H, W); `side` is that of the tiles, or None."""
    height, width = images.shape[-2:]
    return (height, width) if side is None else (side, side)


def stamp_all(stamp: Stamp, images: Tensor, values: Tensor, side: int | None) -> Tensor:
    """Stamp every image with each of K stamps.

    Args:
        stamp: How a canvas is stamped: `blend_pattern`, `add_pattern` or `displace_pixels`.
        images: (B, 3, H, W) in [0, 1].
        values: (K, channels, h, w), the values that `stamp` takes.
        side: Side of the tiles, all of which are stamped; None if the stamps cover the full image.

    Returns:
        (K, B, 3, H, W) in [0, 1].

    Raises:
        ShapeError: The tiles do not cover the images.
    """
    if side is None:
        return stamp(images, values)
    stamped = stamp(tile(images, side), values).flatten(0, 1)
    return untile(stamped, *images.shape[-2:]).unflatten(0, (len(values), len(images)))


def keep_tiles(images: Tensor, stamped: Tensor, places: Tensor, side: int) -> Tensor:
    """Keep the stamp in one tile of each image; elsewhere, return the image.

    Args:
        images: (B, 3, H, W).
        stamped: (K, B, 3, H, W), with stamps in all tiles.
        places: (B,) int64, the number of the tile, row by row.
        side: Side of the tiles.

    Returns:
        (K, B, 3, H, W).
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) // side
    columns = torch.arange(width, device=images.device) // side
    numbers = rows[:, None] * (width // side) + columns
    return torch.where((numbers == places[:, None, None]).unsqueeze(1), stamped, images)
