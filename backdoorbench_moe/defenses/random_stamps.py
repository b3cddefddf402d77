"""Random stamps, drawn anew for every batch, and made more effective by steps along the sign of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from backdoorbench_moe.defenses.stamps import Stamp, blend_pattern, canvas_shape, displace_pixels, stamp_all

# Highest probability of a pixel in an opaque stamp, and highest opacity of a stamp that covers the canvas: with more,
# too little of an image would be left to learn from.
MOST_PIXELS, MOST_OPACITY = 0.5, 0.6
# The kinds of stamps of a batch; "mixed" for all of them.
Tiles = Literal["mixed", "opaque", "blend", "warp"]


@dataclass(frozen=True)
class RandomStamp:
    """A random stamp, and the images that get it.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        side: Side of the tiles; None if the stamp covers the full image.
        stamp: The function that applies the values.
        values: (1, channels, h, w), the last channels of the stamp's values; displacements or colours.
        mask: (1, 1, h, w) in [0, 1], the first channel of the values of a pattern; None for displacements.
        lowest: Lowest possible value; the highest is 1.
    """

    images: Tensor
    side: int | None
    stamp: Stamp
    values: Tensor
    mask: Tensor | None
    lowest: float

    def apply(self) -> Tensor:
        """Return the stamped images, (B, 3, H, W) in [0, 1]."""
        channels = self.values if self.mask is None else torch.cat([self.mask, self.values], 1)
        return stamp_all(self.stamp, self.images, channels, self.side)[0]


def stamp_at_random(tiles: Tiles, side: int | None, images: Tensor, saturated: float = 0.0) -> Tensor:
    """Stamp images with one random stamp of each kind, each on the same number of images.

    Args:
        tiles: The kind, a key of `KINDS`, or "mixed" for all.
        side: Side of the tiles; None if the stamps cover the full image.
        images: (B, 3, H, W) in [0, 1].
        saturated: Probability in [0, 1] that all values of a stamp's colours are 0 or 1. Otherwise, they are uniform.

    Returns:
        (B, 3, H, W) in [0, 1]. Stamps are drawn from torch's global generator.
    """
    return apply_all(draw_stamps(tiles, side, images, saturated))


def draw_stamps(tiles: Tiles, side: int | None, images: Tensor, saturated: float = 0.0) -> list[RandomStamp]:
    """Draw the stamps of `stamp_at_random`, and keep them with their images."""
    names = KINDS if tiles == "mixed" else [tiles]
    parts = images.tensor_split(len(names))
    return [KINDS[name](part, side, saturated) for name, part in zip(names, parts, strict=True) if len(part)]


def apply_all(stamps: list[RandomStamp]) -> Tensor:
    """Return all stamped images, in the order in which the stamps were drawn: (B, 3, H, W) in [0, 1]."""
    return torch.cat([each.apply() for each in stamps])


def strengthen(stamps: list[RandomStamp], loss: Callable[[Tensor], Tensor]) -> list[RandomStamp]:
    """Move the values of each stamp along the sign of the gradient, so that the loss of the stamped images rises.

    Args:
        stamps: The stamps. Masks are not changed.
        loss: Function of all stamped images; a scalar.

    Returns:
        The stamps with moved values, within their range. The size of each stamp's step is drawn from [0, 1), with
        torch's global generator.
    """
    free = [replace(each, values=each.values.detach().requires_grad_()) for each in stamps]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(apply_all(free)), [each.values for each in free])
    moved = []
    for each, gradient in zip(stamps, gradients, strict=True):
        values = each.values + _uniform(each.images, 1) * gradient.sign()
        moved.append(replace(each, values=values.clamp(each.lowest, 1)))
    return moved


def _draw_opaque(images: Tensor, side: int | None, saturated: float) -> RandomStamp:
    shape = canvas_shape(images, side)
    share, kept = _uniform(images, 1, 1, 1), _uniform(images, 1, *shape)
    return _draw_pattern(images, (kept < MOST_PIXELS * share).to(images.dtype), side, saturated)


def _draw_blend(images: Tensor, side: int | None, saturated: float) -> RandomStamp:
    opacity = MOST_OPACITY * _uniform(images, 1, 1, 1)
    return _draw_pattern(images, opacity.expand(1, *canvas_shape(images, side)), side, saturated)


def _draw_warp(images: Tensor, side: int | None, saturated: float) -> RandomStamp:
    """Draw displacements, which have no colours that could be saturated."""
    strength, offsets = _uniform(images, 1), _uniform(images, 1, 2, *canvas_shape(images, side))
    return RandomStamp(images, side, displace_pixels, strength * (2 * offsets - 1), mask=None, lowest=-1.0)


def _draw_pattern(images: Tensor, mask: Tensor, side: int | None, saturated: float) -> RandomStamp:
    """Draw a pattern of random colours that is blended into images by a mask (1, h, w)."""
    pattern = _uniform(images, 3, *mask.shape[1:])
    if saturated:
        pattern = torch.where(_uniform(images, 1) < saturated, pattern.round(), pattern)
    return RandomStamp(images, side, blend_pattern, pattern.unsqueeze(0), mask=mask.unsqueeze(0), lowest=0.0)


def _uniform(images: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1) on the images' device."""
    return torch.rand(*shape, device=images.device)


KINDS: Mapping[str, Callable[[Tensor, int | None, float], RandomStamp]] = {
    "opaque": _draw_opaque,
    "blend": _draw_blend,
    "warp": _draw_warp,
}
