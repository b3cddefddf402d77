"""Random stamps, drawn anew for every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from backdoorbench_moe.defenses.stamps import blend_pattern, canvas_shape, displace_pixels, stamp_all

# Highest probability of a pixel in an opaque stamp, and highest opacity of a stamp that covers the canvas: with more,
# too little of an image would be left to learn from.
MOST_PIXELS, MOST_OPACITY = 0.5, 0.6
# The kinds of stamps of a batch; "mixed" for all of them.
Tiles = Literal["mixed", "opaque", "blend", "warp"]


def stamp_at_random(tiles: Tiles, side: int | None, images: Tensor, saturated: float = 0.0) -> Tensor:
    """Stamp images with one random stamp of each kind, each on the same number of images.

    Args:
        tiles: The kind, a key of `STAMPS`, or "mixed" for all.
        side: Side of the tiles; None if the stamps cover the full image.
        images: (B, 3, H, W) in [0, 1].
        saturated: Probability in [0, 1] that all values of a stamp's colours are 0 or 1. Otherwise, they are uniform.

    Returns:
        (B, 3, H, W) in [0, 1]. Stamps are drawn from torch's global generator.
    """
    names = STAMPS if tiles == "mixed" else [tiles]
    return torch.cat(
        [
            STAMPS[name](part, side, saturated) if len(part) else part
            for name, part in zip(names, images.tensor_split(len(names)), strict=True)
        ]
    )


def _stamp_opaque(images: Tensor, side: int | None, saturated: float) -> Tensor:
    height, width = canvas_shape(images, side)
    share, kept = _uniform(images, 1, 1, 1), _uniform(images, 1, height, width)
    return _blend(images, (kept < MOST_PIXELS * share).to(images.dtype), side, saturated)


def _stamp_blend(images: Tensor, side: int | None, saturated: float) -> Tensor:
    opacity = MOST_OPACITY * _uniform(images, 1, 1, 1)
    return _blend(images, opacity.expand(1, *canvas_shape(images, side)), side, saturated)


def _stamp_warp(images: Tensor, side: int | None, saturated: float) -> Tensor:
    """Displace pixels; there are no colours to saturate."""
    strength, offsets = _uniform(images, 1), _uniform(images, 1, 2, *canvas_shape(images, side))
    return stamp_all(displace_pixels, images, strength * (2 * offsets - 1), side)[0]


def _blend(images: Tensor, mask: Tensor, side: int | None, saturated: float) -> Tensor:
    """Blend a pattern of random colours into images, by a mask (1, h, w)."""
    pattern = _uniform(images, 3, *mask.shape[1:])
    if saturated:
        pattern = torch.where(_uniform(images, 1) < saturated, pattern.round(), pattern)
    return stamp_all(blend_pattern, images, torch.cat([mask, pattern]).unsqueeze(0), side)[0]


def _uniform(images: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1) on the images' device."""
    return torch.rand(*shape, device=images.device)


STAMPS: Mapping[str, Callable[[Tensor, int | None, float], Tensor]] = {
    "opaque": _stamp_opaque,
    "blend": _stamp_blend,
    "warp": _stamp_warp,
}
