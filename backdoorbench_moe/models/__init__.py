"""Models, which map images to logits. Routed models also report which experts process each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.models.common import ModelRegistry
from backdoorbench_moe.options import convert

if TYPE_CHECKING:
    from torch import nn

registry = ModelRegistry("model")


def create_model(name: str, *, num_classes: int = 10, image_size: int = 32, **options: object) -> nn.Module:
    """Build a model for images (B, 3, image_size, image_size) in [0, 1].

    Weights are drawn from torch's global generator; seed it first to make them reproducible.

    Args:
        name: Name of a model, see `list_models`. `timm:<architecture>` builds any timm architecture without weights.
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        **options: Options of the model, and those of `models.common.CommonOptions`; weights are not loaded.

    Returns:
        The model, in training mode.

    Raises:
        UnknownNameError: There is no such model or option.
        ConfigError: An option is of the wrong type or out of range.
        PluginError: The model belongs to a third-party package and cannot be used.
    """
    given = {"num_classes": num_classes, "image_size": image_size}
    return registry.create(name, options, {key: convert(value, int, key) for key, value in given.items()})


def list_models() -> list[str]:
    """Return the names of all built-in and third-party models. `timm` stands for every `timm:<architecture>`."""
    return registry.names()
