"""Preparation of modules for the other functions."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn


def normalised(
    model: nn.Module,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    *,
    image_size: int,
    resize: int | None = None,
) -> nn.Module:
    """Return a copy of a module that first normalises, and optionally resizes, its input.

    The functions of this package pass images with pixels in [0, 1] to models.

    Args:
        model: A module that takes normalised images.
        mean: The mean of each channel, or a name such as "imagenet", which also sets `std`.
        std: The standard deviation of each channel.
        image_size: Height and width of the images before resizing, in pixels.
        resize: Height and width of the images that the module takes; None for `image_size`.

    Raises:
        ConfigError: A value is out of range.
    """
    from backdoorbench_moe.models.common import COMMON, CommonOptions
    from backdoorbench_moe.models.inputs import prepare_inputs
    from backdoorbench_moe.options import convert

    given = {"mean": mean, "std": std, "resize": resize}
    options = {name: convert(value, COMMON[name].annotation, name) for name, value in given.items()}
    chosen = CommonOptions(**options)
    return prepare_inputs(
        copy.deepcopy(model), normalisation=chosen.normalisation, resize=chosen.resize, image_size=image_size
    )
