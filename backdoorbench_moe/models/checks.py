"""Checks of the sizes that a model is built with."""

from __future__ import annotations

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_integer


def check_positive(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
        ConfigError: For the first size below 1.
    """
    for name, size in sizes.items():
        check_integer(name, size, 1)


def check_image_size(image_size: int, *, at_least: int) -> None:
    """Check that images are large enough for the model's strides.

    Raises:
        ConfigError: If `image_size` is below `at_least` pixels.
    """
    if image_size < at_least:
        raise ConfigError.expected("image_size", f"at least {at_least} for this model", image_size)
