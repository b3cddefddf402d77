"""The trigger interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor

from backdoorbench_moe.ops.checks import check_images


class Trigger(ABC):
    """A change to an image that a backdoored model answers with the attacker's class.

    A trigger is a function of the canvas: it is drawn once, from `seed`, and the same object stamps a
    32x32 image and a 4x4 tile. Subclasses write `stamp`; users call the object.

    tiny: options that the conformance tests make it with, such as those that have no default.
    """

    tiny: ClassVar[Mapping[str, object]] = {}

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    @final
    def __call__(self, images: Tensor) -> Tensor:
        """Return stamped copies of `images`.

        images: (B, C, H, W) float in [0, 1], any device. Returns the same shape, type and device, in
        [0, 1]; the input is untouched. Raises ShapeError for anything else.
        """
        check_images(images, "images")
        stamped = self.stamp(images)
        check_images(stamped, f"output of trigger {type(self).__name__}", like=images)
        return stamped

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """Stamp a checked batch (B, C, H, W) in [0, 1]; must not write to it."""
