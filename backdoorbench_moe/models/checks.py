"""Checks on the sizes a model is built from."""

from __future__ import annotations

from backdoorbench_moe.errors import ConfigError


def check_positive(**sizes: int) -> None:
    """Raise ConfigError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError.expected(name, "a whole number from 1 on", size)


def check_image_size(image_size: int, *, at_least: int) -> None:
    """Raise ConfigError for images too small for the model's strides."""
    if image_size < at_least:
        raise ConfigError.expected("image_size", f"at least {at_least} for this model", image_size)
