"""Stamps that a defender makes himself: what a pixel of the stamp holds, and how it changes an image or its tiles.

A stamp is a tensor of *values*, (channels, h, w), for a canvas of h x w pixels: the whole image, or a tile that is the
same everywhere in the image. Functions here take K stamps at a time, (K, channels, h, w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.patches import tile, untile

FormName = Literal["mask", "additive", "warp"]
ApplicatorName = Literal["image", "patch"]

# Side of the tiles for models without patches of their own, as in BadPatches.
DEFAULT_PATCH_SIZE = 4


class Form(ABC):
    """What the values of a stamp are.

    Attributes:
        channels: Number of values of a pixel.
        spread: Standard deviation of the free variables, from which an inversion starts.
    """

    channels: ClassVar[int]
    spread: ClassVar[float]

    @abstractmethod
    def values(self, free: Tensor) -> Tensor:
        """Map free variables (K, channels, h, w), any real numbers, to values in their range."""

    @abstractmethod
    def stamp(self, canvases: Tensor, values: Tensor) -> Tensor:
        """Stamp canvases (N, 3, h, w) in [0, 1] with each of K stamps: (K, N, 3, h, w) in [0, 1]."""

    @abstractmethod
    def sizes(self, values: Tensor) -> Tensor:
        """Return how much each stamp changes, (K,), in pixels: the number of pixels that it changes completely."""

    @abstractmethod
    def arrays(self, values: Tensor) -> Mapping[str, Tensor]:
        """Return the parts of the values by name, to be kept with a judgement."""


class MaskAndPattern(Form):
    """A mask and a pattern, both in [0, 1]: (1 - mask) * image + mask * pattern.

    The size is the sum of the mask.
    """

    channels, spread = 4, 1.0

    def values(self, free: Tensor) -> Tensor:
        """Map all four channels to [0, 1] by tanh: the mask, then the pattern."""
        return (free.tanh() + 1) / 2

    def stamp(self, canvases: Tensor, values: Tensor) -> Tensor:
        """Blend the pattern in where the mask is."""
        mask, pattern = values.unsqueeze(1).split((1, 3), dim=2)
        return torch.lerp(canvases, pattern, mask)

    def sizes(self, values: Tensor) -> Tensor:
        """Return the L1 norms of the masks."""
        return values[:, 0].sum((1, 2))

    def arrays(self, values: Tensor) -> Mapping[str, Tensor]:
        """Return the masks (K, 1, h, w) and the patterns (K, 3, h, w)."""
        return {"masks": values[:, :1], "patterns": values[:, 1:]}


class Additive(Form):
    """A difference in [-1, 1] that is added to the image, which is then clipped.

    The size is the sum over the pixels of the absolute differences, mean over the colours.
    """

    channels, spread = 3, 0.1

    def values(self, free: Tensor) -> Tensor:
        """Map to [-1, 1] by tanh."""
        return free.tanh()

    def stamp(self, canvases: Tensor, values: Tensor) -> Tensor:
        """Add the difference and clip."""
        return (canvases + values.unsqueeze(1)).clamp(0, 1)

    def sizes(self, values: Tensor) -> Tensor:
        """Return the L1 norms, divided by the number of colour channels."""
        return values.abs().mean(1).sum((1, 2))

    def arrays(self, values: Tensor) -> Mapping[str, Tensor]:
        """Return the differences (K, 3, h, w)."""
        return {"differences": values}


class Displacement(Form):
    """A displacement of each pixel of up to one pixel along each axis, with bilinear interpolation inside the canvas.

    The size is half the sum of the absolute displacements: a pixel counts fully if it is moved by one pixel along both
    axes.
    """

    channels, spread = 2, 0.1

    def values(self, free: Tensor) -> Tensor:
        """Map to [-1, 1] by tanh: pixels along y, then along x."""
        return free.tanh()

    def stamp(self, canvases: Tensor, values: Tensor) -> Tensor:
        """Sample each pixel at its displaced position; positions are clamped to the canvas."""
        height, width = canvases.shape[-2:]
        rows, columns = (torch.arange(n, device=canvases.device) for n in (height, width))
        down, right = values.unbind(1)
        y, x = (rows[:, None] + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)
        flat = canvases.flatten(2)
        top, left = _first(y, height), _first(x, width)
        # Gradients flow through the four weights only, so that no gradient is scattered to pixels.
        moved = torch.zeros((), device=canvases.device)
        for row in (top, top + 1):
            for column in (left, left + 1):
                weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
                # In a canvas of one row or column, the second one does not exist and has the weight 0.
                index = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
                moved = moved + flat[:, :, index].movedim(2, 0) * weight[:, None, None]
        return moved.clamp(0, 1)

    def sizes(self, values: Tensor) -> Tensor:
        """Return the L1 norms, divided by 2."""
        return values.abs().mean(1).sum((1, 2))

    def arrays(self, values: Tensor) -> Mapping[str, Tensor]:
        """Return the displacements (K, 2, h, w)."""
        return {"displacements": values}


def _first(at: Tensor, size: int) -> Tensor:
    """Return the index of the first of the two pixels that a position lies between; the second is one higher."""
    return at.detach().floor().long().clamp(0, max(0, size - 2))


FORMS: Mapping[FormName, Form] = {"mask": MaskAndPattern(), "additive": Additive(), "warp": Displacement()}


def canvas_side(applicator: ApplicatorName, patch_size: int | None, model: nn.Module) -> int | None:
    """Return the side of the tiles; None if the stamp covers the whole image.

    Args:
        applicator: "image" or "patch".
        patch_size: The side that the user asks for; if None it is that of the model's patches, or 4 for a model that
            has none.
        model: The model.

    Raises:
        ConfigError: A side was asked for without tiles, or it does not divide the model's image size.
    """
    if applicator == "image":
        if patch_size is not None:
            raise ConfigError.expected("patch_size", "none for the applicator image", patch_size)
        return None
    own = getattr(model, "patch_size", None)
    side = (own if isinstance(own, int) else DEFAULT_PATCH_SIZE) if patch_size is None else patch_size
    size = getattr(model, "image_size", None)
    if side < 1 or (isinstance(size, int) and size % side):
        raise ConfigError.expected(
            "patch_size",
            f"a divisor of the image's {'height and width' if size is None else f'{size} pixels'}",
            side,
        )
    return side


def canvas_shape(images: Tensor, side: int | None) -> tuple[int, int]:
    """Return height and width of the canvas in images (B, 3, H, W); `side` is that of the tiles, or None."""
    height, width = images.shape[-2:]
    return (height, width) if side is None else (side, side)


def stamp_all(form: Form, images: Tensor, values: Tensor, side: int | None) -> Tensor:
    """Stamp every image with each of K stamps.

    Args:
        form: What the values are.
        images: (B, 3, H, W) in [0, 1].
        values: (K, channels, h, w).
        side: Side of the tiles, all of which are stamped; None if the stamps cover the whole image.

    Returns:
        (K, B, 3, H, W) in [0, 1].
    """
    if side is None:
        return form.stamp(images, values)
    stamped = form.stamp(tile(images, side), values).flatten(0, 1)
    return untile(stamped, *images.shape[-2:]).unflatten(0, (len(values), len(images)))
