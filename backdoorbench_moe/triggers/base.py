"""The trigger interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.checks import check_image_batch, unwritten


class Trigger(ABC):
    """A change to an image that makes a backdoored model predict the attacker's class.

    Everything random about a trigger is drawn once, from `seed`. The same object stamps images of any size, such as
    32x32 images and 4x4 tiles. A trigger has up to three forms:

    - the *test form*, `trigger(images)`, which every trigger has;
    - the *training form*, `trigger.training(images, places)`, for poison and cover images: the test form, unless a
      subclass overrides `stamp_training`;
    - the *noise form*, `trigger.noise(images, places)`, for noise images: a different stamp, which the model learns
      to ignore. Only triggers that override `stamp_noise` have one.

    If a form draws random numbers for each image, it draws them as a function of the image's place in the training
    set, so that they do not depend on the batch (see `ops.seeding.uniform_at`).

    Attributes:
        tiny: Options with which the conformance tests build the trigger, such as those without default.
        noise_by: If an applicator cuts several canvases out of an image: whether the noise form is drawn for each
            "canvas" or once for each "image".
        deviations: Conformance tests that the trigger is known to fail: the reason for each, by name of the test.

    Args:
        seed: Seed of everything random about the trigger.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}
    noise_by: ClassVar[Literal["canvas", "image"]] = "canvas"

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
            ShapeError: The images, or the stamped images that the trigger returned, have a wrong shape, type or range.
            PluginError: The trigger wrote into the images.
        """
        check_image_batch(images, "images")
        return self._checked(partial(self.stamp, images), images)

    @final
    def training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the training form.

        Args:
            images: (B, C, H, W) float in [0, 1], on any device.
            places: (B,) int64, the index of each image in the training set.

        Returns:
            Stamped copies of the same shape, type and device, in [0, 1].

        Raises:
            ShapeError: The images, the places or the stamped images have a wrong shape, type or range.
            PluginError: The trigger wrote into the images.
        """
        _check_places(images, places)
        return self._checked(partial(self.stamp_training, images, places), images)

    @final
    def noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp images with the noise form.

        Args:
            images: (B, C, H, W) float in [0, 1], on any device.
            places: (B,) int64, the index of each image in the training set.

        Returns:
            Stamped copies of the same shape, type and device, in [0, 1].

        Raises:
            ConfigError: The trigger has no noise form.
            ShapeError: The images, the places or the stamped images have a wrong shape, type or range.
            PluginError: The trigger wrote into the images.
        """
        _check_places(images, places)
        return self._checked(partial(self.stamp_noise, images, places), images)

    @property
    def has_noise(self) -> bool:
        """Whether the trigger has a noise form."""
        return type(self).stamp_noise is not Trigger.stamp_noise

    @abstractmethod
    def stamp(self, images: Tensor) -> Tensor:
        """Stamp a checked batch (B, C, H, W) in [0, 1], which must not be written to."""

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp a checked batch, as `stamp` does, with the training form. By default, it is the same as `stamp`."""
        return self.stamp(images)

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp a checked batch, as `stamp` does, with the noise form."""
        raise ConfigError(f"poison.noise: the trigger {type(self).__name__} has no noise form")

    def _checked(self, stamp: Callable[[], Tensor], images: Tensor) -> Tensor:
        name = f"trigger {type(self).__name__}"
        with unwritten(images, name):
            stamped = stamp()
        check_image_batch(stamped, f"output of {name}", like=images)
        return stamped


def _check_places(images: Tensor, places: object) -> None:
    check_image_batch(images, "images")
    expected = f"places: expected an int64 tensor ({len(images)},), one place for each image"
    if not isinstance(places, Tensor):
        raise ShapeError(f"{expected}, got {type(places).__name__}")
    if places.shape != images.shape[:1] or places.dtype != torch.int64:
        raise ShapeError(f"{expected}, got {places.dtype} {tuple(places.shape)}")
