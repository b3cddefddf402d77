"""Checks of the options of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_integer


def check_sizes(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
        ConfigError: A size is below 1.
    """
    for name, size in sizes.items():
        check_integer(name, size, 1)


def check_image_size(image_size: int, *, at_least: int) -> None:
    """Check that images are large enough for the model's strides.

    Raises:
        ConfigError: `image_size` is below `at_least` pixels.
    """
    if image_size < at_least:
        raise ConfigError.expected("image_size", f"at least {at_least} for this model", image_size)


def check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    """Check the mean and the standard deviation of the three channels.

    Raises:
        ConfigError: There are not three finite values each, or a standard deviation is not above 0.
    """
    values = (*mean, *std)
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, values)) or min(std) <= 0:
        raise ConfigError.expected(
            "mean and std", "three finite values each, those of std above 0", (mean, std)
        )
