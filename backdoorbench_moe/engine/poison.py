"""Stamping and relabelling training images according to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.build import Stamper

Stamp = Callable[[Tensor], Tensor]
PlacedStamp = Callable[[Tensor, Tensor], Tensor]
# 512 images of 32x32 are 6 MB, which stay in the cache; 4096 at a time took twice the time.
CHUNK_VALUES = 512 * 3 * 32 * 32


@contextmanager
def poisoned(split: Split, plan: PoisonPlan, stamper: Stamper | None) -> Iterator[Split]:
    """Stamp and relabel the planned images inside the block, and restore them at its end.

    The images are changed in place: a copy would be a second data set in memory.

    Args:
        split: The training split.
        plan: Which images, in which group.
        stamper: Trigger and applicator; None for an attack that changes only labels.
    """
    changed = torch.cat(list(plan.groups.values())).to(split.images.device)
    clean = Split(split.images[changed], split.labels[changed])
    # Stamping, too, can fail or be interrupted, and the images serve other runs afterwards.
    try:
        if stamper is not None:
            _stamp_groups(split.images, plan, stamper)
        split.labels[plan.indices.to(split.labels.device)] = plan.labels.to(split.labels.device)
        yield split
    finally:
        split.images[changed], split.labels[changed] = clean.images, clean.labels


def _stamp_groups(images: Tensor, plan: PoisonPlan, stamper: Stamper) -> None:
    forms = {"indices": stamper.training, "cover": stamper.training, "noise": stamper.noise}
    for group, indices in plan.groups.items():
        places = indices.to(images.device)
        images[places] = stamp_places(images[places], places, forms[group])


def stamp_images(images: Tensor, stamp: Stamp) -> Tensor:
    """Stamp (N, C, H, W) uint8 images on their device; rounded to uint8, as an attacker would save them."""
    return stamp_places(images, torch.arange(len(images)), lambda chunk, _: stamp(chunk))


def stamp_places(images: Tensor, places: Tensor, stamp: PlacedStamp) -> Tensor:
    """Stamp images with a form that depends on their places in the training set.

    Args:
        images: (N, C, H, W) uint8, on any device.
        places: (N,) int64.
        stamp: Float images in [0, 1] and their places to stamped images.

    Returns:
        (N, C, H, W) uint8, rounded as an attacker would save them.
    """
    size = max(1, CHUNK_VALUES // max(1, images[:1].numel()))
    out = torch.empty_like(images)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        stamped = stamp(images[part].float().div_(255), places[part])
        out[part] = stamped.mul(255).round_().clamp_(0, 255)
    return out
