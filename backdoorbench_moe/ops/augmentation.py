"""Augmentation of training images: random transforms of every batch, on its device.

Every draw is a function of the seed, the epoch and the image's place in the training set, not of the batch or the
device. Nothing is read back from the device and no shape depends on a draw, so a training step with augmentation can be
captured as a CUDA graph. With the same draws, kornia's `RandomRotation`, `ColorJitter` and `RandomErasing` give the
same images, but they draw from torch's global generator on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.ops.images import LUMA
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at

CROP_PADDING = 4
ROTATE_DEGREES = 10.0
COLOUR_STRENGTH = 0.4
ERASE_SHARE, ERASE_AREA, ERASE_RATIO = 0.5, (0.02, 0.33), (0.3, 3.3)


def crop(images: Tensor, draws: Tensor) -> Tensor:
    """Pad images with 4 black pixels on each side, and cut out a window of the original size at a random position.

    Args:
        images: (B, C, H, W) float.
        draws: (B, 2) in [0, 1): position of the window from the top and from the left.

    Source:
        He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2; BackdoorBench, for all data.
    """
    padded = F.pad(images, [CROP_PADDING] * 4)
    start = (draws * (2 * CROP_PADDING + 1)).long()
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    rows, columns = (
        start[:, axis, None] + torch.arange(size, device=images.device)
        for axis, size in enumerate(images.shape[-2:])
    )
    return padded[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Flip images horizontally with probability 0.5.

    Not suitable for data in which left and right matter, such as traffic signs.

    Args:
        images: (B, C, H, W) float.
        draws: (B, 1) in [0, 1).

    Source:
        He et al. (see `crop`); BackdoorBench, for CIFAR-10 only.
    """
    return torch.where(draws.view(-1, 1, 1, 1) < 0.5, images.flip(-1), images)


def rotate(images: Tensor, draws: Tensor) -> Tensor:
    """Rotate images about their centres by a random angle in [-10, 10) degrees; pixels from outside are black.

    Departure: all images are rotated; the codes of the source rotate half of them.

    Args:
        images: (B, C, H, W) float.
        draws: (B, 1) in [0, 1); below 0.5 the image turns clockwise.

    Source:
        The codes of WaNet and of the input-aware attack.
    """
    angles = (draws[:, 0] * 2 - 1) * math.radians(ROTATE_DEGREES)
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Coordinates are shares of the height and of the width, which may differ.
    height, width = images.shape[-2:]
    back = torch.stack([cos, -sin * height / width, none, sin * width / height, cos, none], dim=1)
    grid = F.affine_grid(back.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def colour(images: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, in this order, each by a random factor in [0.6, 1.4).

    Departure: torchvision's `ColorJitter` also draws the order, and can change the hue.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        draws: (B, 3) in [0, 1).

    Source:
        `ColorJitter(0.4, 0.4, 0.4)` of torchvision.
    """
    factors = 1 + COLOUR_STRENGTH * (draws * 2 - 1)
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors.unbind(1))
    images = (images * brightness).clamp(0, 1)
    images = _blend(images, _grey(images).mean((2, 3), keepdim=True), contrast)
    return _blend(images, _grey(images), saturation)


def erase(images: Tensor, draws: Tensor) -> Tensor:
    """Make a random rectangle of half of the images black.

    Its area is 2 to 33 percent of the image, and its height 0.3 to 3.3 times its width.

    Departure: a rectangle that is longer than the image is cut off, as in kornia; the paper draws another one.

    Args:
        images: (B, C, H, W) float.
        draws: (B, 5) in [0, 1): whether to erase, area, logarithm of the ratio, and the position from top and left.

    Source:
        Zhong et al., "Random erasing data augmentation", AAAI 2020; the ranges of torchvision's `RandomErasing`.
    """
    height, width = images.shape[-2:]
    chosen, area, ratio, top, left = draws.unbind(1)
    area = height * width * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area)
    low, high = (math.log(each) for each in ERASE_RATIO)
    ratio = (low + (high - low) * ratio).exp()
    rows = _inside((area * ratio).sqrt(), top, height)
    columns = _inside((area / ratio).sqrt(), left, width)
    erased = rows.unsqueeze(2) & columns.unsqueeze(1) & (chosen < ERASE_SHARE).view(-1, 1, 1)
    return images.masked_fill(erased.unsqueeze(1), 0)


def _inside(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Return which of `size` pixels are in an interval, (B, size) bool, given its length and place in [0, 1), (B,)."""
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor().unsqueeze(1)
    pixels = torch.arange(size, device=length.device)
    return (pixels >= start) & (pixels < start + length.unsqueeze(1))


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * other).clamp(0, 1)


# Each step and the number of its draws per image, by the step's name in `config.train.AUGMENTATIONS`.
STEPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "crop": (crop, 2),
    "flip": (flip, 1),
    "rotate": (rotate, 1),
    "colour": (colour, 3),
    "erase": (erase, 5),
}


class Augmentation:
    """A function that augments the images of a batch.

    Args:
        steps: Names of the steps, in the order in which they are applied; see `STEPS`.
        seed: The seed of the training.
        device: The device of the images.
    """

    def __init__(self, steps: Sequence[str], seed: int, device: torch.device) -> None:
        self.steps, self._seed = tuple(steps), seed
        # On the device and changed in place, because a CUDA graph reads them from the captured address.
        self._seeds = torch.zeros(len(self.steps), dtype=torch.int64, device=device)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Use the random numbers of this epoch from now on."""
        seeds = [derive_seed(self._seed, "augment", step, epoch) for step in self.steps]
        self._seeds.copy_(torch.tensor(seeds, dtype=torch.int64))

    def __call__(self, images: Tensor, places: Tensor) -> Tensor:
        """Augment images.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], on the device.
            places: (B,) int64, their places in the training set.

        Returns:
            Augmented copies of the same shape, channels last.
        """
        for step, seed in zip(self.steps, self._seeds, strict=True):
            change, count = STEPS[step]
            images = change(images, uniform_at(seed, places, count))
        return images.contiguous(memory_format=torch.channels_last)
