"""Stamp and relabel training images according to a poison plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.ops.images import change_images
from backdoorbench_moe.ops.stored_images import StoredImages, replaced

Stamp = Callable[[Tensor], Tensor]
PlacedStamp = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def poisoned(split: Split, plan: PoisonPlan, stamper: Stamper | None) -> Iterator[Split]:
    """Stamp and relabel the planned images inside the block, and restore them at its end.

    Images in memory are changed in place, since a copy would double the memory of the data set. Stored images are not
    changed; the stamped ones are kept separately.

    Args:
        split: The training split.
        plan: The images of each group, and the labels of the poison group.
        stamper: Trigger and applicator; None for an attack that changes only labels.
    """
    if isinstance(split.images, StoredImages):
        images = split.images if stamper is None else _stamp_groups(split.images, plan, stamper)
        yield Split(images, _relabel(split.labels.clone(), plan))
        return
    changed = torch.cat(list(plan.groups.values())).to(split.images.device)
    clean = Split(split.images[changed], split.labels[changed])
    # Stamping may also fail or be interrupted, and other runs use the images afterwards.
    try:
        if stamper is not None:
            _stamp_groups(split.images, plan, stamper)
        _relabel(split.labels, plan)
        yield split
    finally:
        split.images[changed], split.labels[changed] = clean.images, clean.labels


def _relabel(labels: Tensor, plan: PoisonPlan) -> Tensor:
    labels[plan.indices.to(labels.device)] = plan.labels.to(labels.device)
    return labels


def _stamp_groups(images: Tensor, plan: PoisonPlan, stamper: Stamper) -> Tensor:
    forms = {"indices": stamper.training, "cover": stamper.training, "noise": stamper.noise}
    for group, indices in plan.groups.items():
        places = indices.to(images.device)
        images = replaced(images, places, stamp_places(images[places], places, forms[group]))
    return images


def stamp_images(images: Tensor, stamp: Stamp) -> Tensor:
    """Stamp (N, C, H, W) uint8 images on their device, and round them to uint8 as an attacker would save them."""
    return stamp_places(images, torch.arange(len(images)), lambda chunk, _: stamp(chunk))


def stamp_places(images: Tensor, places: Tensor, stamp: PlacedStamp) -> Tensor:
    """Stamp images with a form of the trigger that depends on their indices in the training set.

    Args:
        images: (N, C, H, W) uint8, on any device.
        places: (N,) int64, the indices of the images.
        stamp: Function from float images in [0, 1] and their indices to stamped images.

    Returns:
        (N, C, H, W) uint8, rounded as an attacker would save them.
    """
    return change_images(images, lambda chunk, part: stamp(chunk, places[part]))
