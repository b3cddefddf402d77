"""The trigger of Refool (Liu et al., ECCV 2020): a reflection, as in a window pane."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.canvas import PerCanvas
from backdoorbench_moe.triggers.picture import draw_quilt, fit_picture, read_picture

Form = Literal["random", "ghost", "blurred"]
# The reflection is computed with this side, and then resized to the canvas.
SIDE = 256
# The shift and sigma refer to images of this side.
IMAGE_SIDE = 32
GHOSTS = 0.49
# Standard deviation of the weight of a blurred reflection, as a share of the side.
SPREAD = 0.4


class Reflection(Trigger):
    """Blend the reflection of a picture into the image, as in Refool.

    The reflection is a random part of a picture, mirrored or not. It has one of two forms: a *ghost*, two shifted
    copies as from a pane with two surfaces; or *blurred*, out of focus and strongest around one point. Everything is
    drawn once from `seed`. The stamped image is (1 - alpha w) * image + alpha w * reflection, where w is 1 for a ghost;
    for a blurred reflection, w is 1 at a point near the centre and falls off around it.

    Departures: Refool draws a picture, form, shift and sigma for each image, from pictures of PASCAL VOC; here, all
    images get the same reflection. Refool first enlarges images to 560 pixels, where its shift of 3 to 8 pixels is less
    than half a pixel of an image of 32. Here, shift and sigma have these values for images with a side of 32, and are
    scaled with the canvas. The mean brightness of a blurred reflection is not adjusted, and values are not converted to
    linear light.

    Args:
        alpha: Weight of the reflection, in (0, 1]; 0.4 in BackdoorBench. Refool draws it between 0.05 and 0.45 for each
            image.
        form: "ghost", "blurred", or "random", which draws a ghost with probability 0.49.
        image: Path of a picture file. By default, a picture of this package.
        seed: Seed of the part of the picture, the form, shift, sigma and weight.

    Attributes:
        is_ghost: Whether the reflection is a ghost.
        shift: Shift between the two copies of a ghost in pixels of an image of 32x32, (down, right), both in 3..8.
        sigma: Standard deviation of the blur in pixels of an image of 32x32, in [1, 5).

    Raises:
        ConfigError: `alpha` is out of range, or the file is missing, damaged or not an 8-bit picture.
        UnknownNameError: `form` is unknown.

    Source:
        Liu et al., "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020, and its code.
    """

    def __init__(
        self, *, alpha: float = 0.4, form: Form = "random", image: FilePath | None = None, seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        check_interval("reflection: alpha", alpha, "(0, 1]")
        if form not in get_args(Form):
            raise UnknownNameError("reflection: form", form, get_args(Form))
        self.alpha, self.form, self.image = alpha, form, image
        self._picture = None if image is None else read_picture(image, "reflection")
        drawn = torch.rand(10, generator=generator(seed, "reflection"), dtype=torch.float64).tolist()
        self._part, self._mirrored, self._centre, self._faint = (
            drawn[:3],
            drawn[3] < 0.5,
            drawn[4:6],
            drawn[6],
        )
        self.is_ghost = form == "ghost" or (form == "random" and drawn[7] < GHOSTS)
        self.shift = (3 + int(6 * drawn[8]), 3 + int(6 * drawn[9]))
        self.sigma = 1 + 4 * drawn[8]
        self._layers = PerCanvas(self._make)

    def stamp(self, images: Tensor) -> Tensor:
        """Blend the reflection into every image.

        Raises:
            ShapeError: The images have neither 1 nor 3 channels.
        """
        reflection, weight = self._layers(images)
        return (images * (1 - weight) + reflection).clamp(0, 1).to(images.dtype)

    def _make(self, channels: int, height: int, width: int) -> Tensor:
        """Return the reflection times its weight, and the weight, (2, channels, H, W) float32."""
        part = self._cut_out(draw_quilt() if self._picture is None else self._picture)
        layer, weight = self._ghost(part) if self.is_ghost else self._blurred(part)
        layers = torch.cat([weight * layer, weight.expand_as(layer)])
        return self.alpha * fit_picture(layers, channels, height, width, "reflection")

    def _cut_out(self, picture: Tensor) -> Tensor:
        """Return a part of a picture (1, 3, h, w), at least half as high and wide, as (1, 3, SIDE, SIDE)."""
        share, down, right = self._part
        sides = [max(1, round((0.5 + share / 2) * side)) for side in picture.shape[-2:]]
        top, left = (
            int(place * (side - cut + 1))
            for place, side, cut in zip((down, right), picture.shape[-2:], sides, strict=True)
        )
        part = picture[..., top : top + sides[0], left : left + sides[1]]
        part = F.interpolate(part, (SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1)
        return part.flip(-1) if self._mirrored else part

    def _ghost(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return two shifted copies, one of them fainter, and the weight 1."""
        down, right = (pixels * SIDE // IMAGE_SIDE for pixels in self.shift)
        shifted = F.pad(part, (right, 0, down, 0), mode="replicate")[..., :SIDE, :SIDE]
        # Refool draws the weight of the fainter copy from 0.15..0.5. Either copy may be the fainter one.
        faint = 0.15 + 0.7 * self._faint
        return faint * shifted + (1 - faint) * part, part.new_ones(1, 1, SIDE, SIDE)

    def _blurred(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blurred picture, and a weight that falls off around a point in the middle half."""
        sigma = self.sigma * SIDE / IMAGE_SIDE
        reach = min(SIDE // 2 - 1, round(3 * sigma))
        layer = gaussian_blur2d(part, (2 * reach + 1,) * 2, (sigma, sigma), separable=True)
        axis = (torch.arange(SIDE, dtype=torch.float32) + 0.5) / SIDE
        down, right = (
            torch.exp(-((axis - 0.25 - 0.5 * place) ** 2) / (2 * SPREAD**2)) for place in self._centre
        )
        return layer, torch.outer(down, right).view(1, 1, SIDE, SIDE)
