"""The applicator interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, final

from torch import Tensor

from backdoorbench_moe.ops.checks import check_image_batch, unwritten


class Applicator(ABC):
    """Base class of applicators, which determine where a trigger is stamped, such as on the full image or every tile.

    Subclasses implement `apply`; users call an instance.

    Attributes:
        tiny: Options with which the conformance tests build the applicator, such as those without default.
        deviations: Conformance tests that the applicator is known to fail: the reason for each, by name of the test.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @final
    def __call__(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp images with a trigger.

        Args:
            images: (B, C, H, W) float in [0, 1], on any device; they are not changed.
            trigger: Function that stamps images or tiles, (N, C, h, w) float in [0, 1].

        Returns:
            Stamped copies of the same shape, type and device, in [0, 1].

        Raises:
            ShapeError: The images, or the stamped images that the applicator returned, have a wrong shape, type or
                range.
            PluginError: The applicator, or the trigger in it, wrote into the images.
        """
        check_image_batch(images, "images")
        name = f"applicator {type(self).__name__}"
        with unwritten(images, name):
            stamped = self.apply(images, trigger)
        check_image_batch(stamped, f"output of {name}", like=images)
        return stamped

    @abstractmethod
    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `trigger` to a checked batch (B, C, H, W) in [0, 1], which must not be written to."""
