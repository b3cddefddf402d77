"""The applicator interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, final

from torch import Tensor

from backdoorbench_moe.ops.checks import check_image_batch


class Applicator(ABC):
    """Where a trigger is applied: to the whole image, to every tile of it, or anywhere else.

    Subclasses write `apply`; users call the object.

    Attributes:
        tiny: Options that the conformance tests build the applicator with, such as those that have no default.
        deviations: Conformance tests that the applicator is known to fail, and why: reasons by name of the test.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @final
    def __call__(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Return copies of `images` with `trigger` applied.

        images: (B, C, H, W) float in [0, 1], any device. Returns the same shape, type and device, in
        [0, 1]; the input is untouched. Raises ShapeError for anything else.
        """
        check_image_batch(images, "images")
        stamped = self.apply(images, trigger)
        check_image_batch(stamped, f"output of applicator {type(self).__name__}", like=images)
        return stamped

    @abstractmethod
    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `trigger` to a checked batch (B, C, H, W) in [0, 1]; must not write to it."""
