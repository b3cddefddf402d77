"""The trigger interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.checks import check_image_batch


class Trigger(ABC):
    """A change to an image that a backdoored model answers with the attacker's class.

    A trigger is a function of the canvas: it is drawn once, from `seed`, and the same object stamps a 32x32 image
    and a 4x4 tile. It has up to three forms:

    - the *test form*, `trigger(images)`, which every trigger has;
    - the *training form*, `trigger.training(images, places)`, for poison and cover images: the test form, unless a
      subclass overrides `stamp_training`;
    - the *noise form*, `trigger.noise(images, places)`, for noise images: another stamp, which the model is to learn
      to ignore. Only triggers that override `stamp_noise` have it.

    A form that draws something for each image draws it as a function of the image's place in the training set, so
    that it does not depend on the batch (see `ops.seeding.uniform_at`).

    Attributes:
        tiny: Options that the conformance tests build the trigger with, such as those that have no default.
        deviations: Conformance tests that the trigger is known to fail, and why: reasons by name of the test.

    Args:
        seed: Seed of everything that the trigger draws.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    @final
    def __call__(self, images: Tensor) -> Tensor:
        """Stamp images with the test form.

        Args:
            images: (B, C, H, W) float in [0, 1], on any device.

        Returns:
            Stamped copies of the same shape, type and device, in [0, 1].

        Raises:
            ShapeError: The images, or what the trigger made of them, are not as said here.
        """
        check_image_batch(images, "images")
        return self._checked(self.stamp(images), images)

    @final
    def training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the training form.

        Args:
            images: (B, C, H, W) float in [0, 1], on any device.
            places: (B,) int64, where each image stands in the training set.

        Returns:
            Stamped copies, as `__call__`.
        """
        _check_places(images, places)
        return self._checked(self.stamp_training(images, places), images)

    @final
    def noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the noise form; arguments and result as of `training`.

        Raises:
            ConfigError: The trigger has no noise form.
        """
        _check_places(images, places)
        return self._checked(self.stamp_noise(images, places), images)

    @property
    def has_noise(self) -> bool:
        """Whether the trigger has a noise form."""
        return type(self).stamp_noise is not Trigger.stamp_noise

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """Stamp a checked batch (B, C, H, W) in [0, 1]; must not write to it."""

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp a checked batch (B, C, H, W) as `stamp`, in the form that training images get."""
        return self.stamp(images)

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp a checked batch (B, C, H, W) with another stamp than the trigger's own."""
        raise ConfigError(f"poison.noise: the trigger {type(self).__name__} has no noise form")

    def _checked(self, stamped: Tensor, images: Tensor) -> Tensor:
        check_image_batch(stamped, f"output of trigger {type(self).__name__}", like=images)
        return stamped


def _check_places(images: Tensor, places: object) -> None:
    check_image_batch(images, "images")
    expected = f"places: expected an int64 tensor ({len(images)},), one place for each image"
    if not isinstance(places, Tensor):
        raise ShapeError(f"{expected}, got {type(places).__name__}")
    if places.shape != images.shape[:1] or places.dtype != torch.int64:
        raise ShapeError(f"{expected}, got {places.dtype} {tuple(places.shape)}")
