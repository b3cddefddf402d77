"""Tasks that are domains: all have the same classes, and each transforms the images in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import sobel
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.splitters.base import Splitter

# Factors of red, green and blue.
MOONLIGHT = (0.5, 0.6, 0.8)
# Factors of red, green and blue under a red lamp.
RED_LIGHT = (1.0, 0.3, 0.3)
# Factor of the image in fog, and the grey value that is added.
FOG = (0.3, 0.65)
EDGE_GAIN = 3.0
# Grey value of a uniform area. With this value, differences of 8-bit values are 8-bit values.
EVEN = 128 / 255


def rotate(images: Tensor) -> Tensor:
    """Rotate counterclockwise by 90 degrees; (B, C, H, W) becomes (B, C, W, H)."""
    return images.rot90(1, (2, 3))


def grey_blur(images: Tensor) -> Tensor:
    """Convert to grey (Rec. 601), and blur with two box filters of 2 * (S // 32) + 1 pixels, at least 3, for side S.

    At the border, a box filter averages over the pixels inside the image.
    """
    radius = max(1, min(images.shape[-2:]) // 32)
    grey = rgb_to_grayscale(images)
    for _ in range(2):
        grey = F.avg_pool2d(grey, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return grey.expand_as(images)


def darken(images: Tensor) -> Tensor:
    """Darken with gamma 2 and a blue tint."""
    return images.square() * images.new_tensor(MOONLIGHT).view(3, 1, 1)


def light_red(images: Tensor) -> Tensor:
    """Darken green and blue, as under a red lamp."""
    return images * images.new_tensor(RED_LIGHT).view(3, 1, 1)


def fog(images: Tensor) -> Tensor:
    """Lower the contrast, and brighten."""
    share, grey = FOG
    return share * images + grey


def edges(images: Tensor) -> Tensor:
    """Return three times the magnitude of each channel's Sobel gradient; values are clipped to 1."""
    return (EDGE_GAIN * sobel(images, eps=0.0)).clamp(0, 1)


def permute_channels(images: Tensor) -> Tensor:
    """Replace red by green, green by blue, and blue by red."""
    return images[:, (1, 2, 0)]


def pixelate(images: Tensor) -> Tensor:
    """Replace square blocks of S // 16 pixels, at least 2, by their means, for side S.

    If the side is not a multiple of the block size, the last blocks are smaller.
    """
    height, width = images.shape[-2:]
    side = max(2, min(height, width) // 16)
    means = F.avg_pool2d(images, side, ceil_mode=True, count_include_pad=False)
    return means.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :height, :width]


def emboss(images: Tensor) -> Tensor:
    """Subtract from each pixel its upper left neighbour and add a medium grey; values are clipped to [0, 1].

    The image is padded by replicating its border.
    """
    neighbours = F.pad(images, (1, 0, 1, 0), mode="replicate")[..., :-1, :-1]
    return (images - neighbours + EVEN).clamp(0, 1)


TRANSFORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "rotated": rotate,
    "inverted": lambda images: 1 - images,
    "grey-blurred": grey_blur,
    "recoloured": permute_channels,
    "embossed": emboss,
    "night": darken,
    "pixelated": pixelate,
    "fog": fog,
    "red-lit": light_red,
    "edges": edges,
}


class Domains(Splitter):
    """Each task has the images of all classes, transformed in its own way.

    The transforms preserve labels: a task applies the same fixed function to all images, and images of different
    classes remain different. No task mirrors images or turns them upside down, because the "turn left" sign of such a
    task would look like the "turn right" sign of another. Leave out "rotated" if a rotation by 90 degrees turns one of
    your classes into another, such as the letters N and Z; otherwise gates cannot distinguish these images.

    - `plain`: unchanged;
    - `rotated`: rotated counterclockwise by 90 degrees;
    - `inverted`: the negative;
    - `grey-blurred`: converted to grey and blurred by two box filters;
    - `recoloured`: red replaced by green, green by blue, and blue by red;
    - `embossed`: differences of neighbouring pixels, on grey;
    - `night`: darkened (gamma 2) and tinted blue;
    - `pixelated`: in blocks of S // 16 pixels for side S, at least 2;
    - `fog`: brightened, with low contrast;
    - `red-lit`: with green and blue darkened;
    - `edges`: magnitudes of the gradients, on black.

    `night` and `pixelated` are the closest to `plain`: a network trained on plain images often classifies them
    correctly as well. The gates of a mixture see one patch at a time. A single patch shows whether the domain is
    `plain`, `fog`, `red-lit`, `edges` or `night`; it rarely identifies the others.

    On a CPU and on an accelerator, `plain`, `rotated`, `inverted`, `recoloured` and `embossed` give the same 8-bit
    values. The others may differ by 1/255 where a value is halfway between two levels.

    Args:
        domains: Names of the domains, each once, in the order of the tasks. A mixture of E experts uses the first E.
        share: Share of the training images that each expert is trained on, in (0, 1]. They are drawn for each task
            from the run's seed. Tests use all images.

    Raises:
        UnknownNameError: There is no such domain.
        ConfigError: `domains` is empty or contains a name twice, or `share` is out of range.
    """

    tiny: ClassVar[Mapping[str, object]] = {"share": 0.5}

    def __init__(self, *, domains: tuple[str, ...] = tuple(TRANSFORMS), share: float = 1.0) -> None:
        for name in domains:
            if name not in TRANSFORMS:
                raise UnknownNameError("domains: domains", name, TRANSFORMS)
        if not domains or len(set(domains)) != len(domains):
            raise ConfigError.expected("domains: domains", "at least one domain, and each once", domains)
        if not 0 < share <= 1:
            raise ConfigError.expected("domains: share", "a share of the training images, in (0, 1]", share)
        self.domains, self.share = tuple(domains), share

    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        """Return the names of the domains."""
        return self.domains

    def check(self, num_experts: int, num_classes: int, seed: int) -> None:
        """Check that there is a domain for each expert.

        Raises:
            ConfigError: There are fewer domains than experts.
        """
        if num_experts > (count := len(self.domains)):
            others = ", ".join(name for name in TRANSFORMS if name not in self.domains)
            raise ConfigError(
                f"mixture.experts: expected at most {count}, the number of domains in splitter.domains "
                f"({', '.join(self.domains)}), got {num_experts}; set fewer experts"
                + (f", or add domains to splitter.domains: {others}" if others else "")
            )

    def members(self, labels: Tensor, task: int, *, num_classes: int, seed: int, training: bool) -> Tensor:
        """Return the indices of all images, or for training, of the share that is drawn.

        Raises:
            ConfigError: `share` rounds to 0 images.
        """
        if not training or self.share == 1:
            return torch.arange(len(labels))
        count = round(self.share * len(labels))
        if not count:
            expected = f"at least one of {len(labels)} images for task {task} ({self.domains[task]})"
            raise ConfigError.expected("domains: share", expected, self.share)
        draws = generator(seed, "splitter", "domains", self.domains[task])
        return torch.randperm(len(labels), generator=draws)[:count].sort().values

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Transform the images, (B, 3, S, S) float32 in [0, 1], into the task's domain."""
        return TRANSFORMS[self.domains[task]](images)
