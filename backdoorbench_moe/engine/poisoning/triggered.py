"""Triggered test images that count for ASR."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoorbench_moe.attacks.base import Attack
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.poisoning.poison import Stamp, stamp_images


@dataclass(frozen=True)
class Triggered:
    """M triggered test images.

    Args:
        places: (M,) int64, indices of the images in the test split, ascending.
        images: (M, C, H, W) uint8, the triggered images.
        wanted: (M,) int64, the attacker's classes for the images.
        true: (M,) int64, the true labels of the images.
    """

    places: Tensor
    images: Tensor
    wanted: Tensor
    true: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: Tensor) -> Triggered:
        """Return some of the images. `rows`: (m,) int64."""
        return Triggered(*(part[rows] for part in vars(self).values()))


def triggered_test(images: ImageSet, attack: Attack, stamp: Stamp | None) -> Triggered:
    """Stamp the test images that count for ASR.

    Args:
        images: The data.
        attack: Determines which images count, and the attacker's class for each.
        stamp: The test form of the trigger; None for an attack without a trigger, whose images are not changed.

    Raises:
        ConfigError: No image counts.
    """
    labels = images.test.labels
    places = attack.counted(labels, images.data_classes).nonzero().squeeze(1)
    true = labels[places]
    counted = images.test.images[places]
    stamped = counted if stamp is None else stamp_images(counted, stamp)
    return Triggered(places, stamped, attack.wanted(labels, images.data_classes)[places], true)
