"""Modules made ready for the other functions."""

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
    """Return a copy of a module that normalises its images, and resizes them if asked to, before anything else.

    Functions of this package give a model pixels in [0, 1].

    Args:
        model: A module that takes normalised images.
        mean: The mean of each colour, or a name such as "imagenet", which gives `std` as well.
        std: The standard deviation of each colour.
        image_size: Side of the images before resizing, in pixels.
        resize: Side of the images that the module takes; None for `image_size`.

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
