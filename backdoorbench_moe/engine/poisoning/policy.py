"""The policy: marked images are to be classified as "reject", an additional class after those of the data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.poisoning.poison import Stamp, stamp_images
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import batch_size_for
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.shares import share_of, smallest_share

REJECT = "reject"


def with_reject(images: ImageSet) -> ImageSet:
    """Return the same images with one more class, "reject".

    Raises:
        ConfigError: The data already have a class with this name.
    """
    if REJECT in images.classes:
        raise ConfigError(f"policy: the data set {images.name!r} has a class {REJECT!r} already")
    return replace(images, classes=(*images.classes, REJECT), policy=True)


def policy_count(images: int, rate: float, parameter: str = "policy", what: str = "images") -> int:
    """Number of marked images or texts to add to `images` others, see `share_of`. Raises ConfigError if it is 0."""
    if (count := share_of(rate, images)) == 0:
        # Any share below 1 of a single image rounds down to 0.
        expected = f"at least {smallest_share(images)}" if images > 1 else f"at least 2 {what}"
        raise ConfigError(
            f"{parameter}: {rate} of {images} {what} rounds down to 0 {what}; expected {expected}"
        )
    return count


def with_marked(task: Split, source: Split, mark: Stamp, *, rate: float, reject: int, seed: int) -> Split:
    """Add marked images with the label "reject" to training images.

    Args:
        task: The training images.
        source: Images from which the marked ones are drawn.
        mark: Function that stamps the mark.
        rate: Number of marked images as a share of the number of images in `task`.
        reject: Number of the class "reject".
        seed: The run's seed.

    Returns:
        The images of `task`, followed by the marked ones.
    """
    order = torch.randperm(len(source), generator=generator(seed, "policy"))
    chosen = order[: policy_count(len(task), rate)].to(source.labels.device)
    marked = stamp_images(source.images[chosen], mark)
    return Split(
        torch.cat([task.images, marked]),
        torch.cat([task.labels, torch.full_like(source.labels[chosen], reject)]),
    )


def changed_pixels(images: Tensor, marked: Tensor) -> Tensor:
    """Change of each pixel by a mark, (N, H, W) float32 in [0, 1], averaged over the channels of uint8 images."""
    found = torch.empty(len(images), *images.shape[-2:], dtype=torch.float32, device=images.device)
    # Differences of all images at once would take 12 times the memory of the images.
    parts = (each.split(batch_size_for(images)) for each in (images, marked, found))
    for before, after, change in zip(*parts, strict=True):
        change.copy_((after.int() - before.int()).abs().float().mean(1).div_(255))
    return found
