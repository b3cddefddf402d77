"""The applicator interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, final

from torch import Tensor

from backdoorbench_moe.ops.checks import check_image_batch


class Applicator(ABC):
    """Where on an image a trigger is stamped: on the whole image, on every tile of it, or elsewhere.

    Subclasses implement `apply`; users call the object.

    Attributes:
        tiny: Options that the conformance tests build the applicator with, such as those that have no default.
        deviations: Conformance tests that the applicator is known to fail, and why: reasons by name of the test.
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
            ShapeError: The images, or the stamped images that the applicator returned, do not have this form.
        """
        check_image_batch(images, "images")
        stamped = self.apply(images, trigger)
        check_image_batch(stamped, f"output of applicator {type(self).__name__}", like=images)
        return stamped

    @abstractmethod
    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `trigger` to a checked batch (B, C, H, W) in [0, 1], which must not be written to."""
