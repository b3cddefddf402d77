"""Models, which map images to logits. Routed models also report which experts process each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.models.common import ModelRegistry

if TYPE_CHECKING:
    from torch import nn

registry = ModelRegistry("model")


def create_model(name: str, *, num_classes: int = 10, image_size: int = 32, **options: object) -> nn.Module:
    """Build a model for images (B, 3, image_size, image_size) in [0, 1].

    Weights are drawn from torch's global generator; seed it first for reproducible weights.

    Args:
        name: Name of a model, see `list_models`. `timm:<architecture>` builds any timm architecture from scratch.
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        **options: The model's own options, and those of `models.common.CommonOptions`; weights are not loaded.

    Returns:
        The model, in training mode.

    Raises:
        UnknownNameError: For a name or option that does not exist.
        ConfigError: For an option of the wrong type or out of range.
        PluginError: If the model is a plug-in's and cannot be loaded.
    """
    return registry.create(name, options, {"num_classes": num_classes, "image_size": image_size})


def list_models() -> list[str]:
    """Return the names of all built-in and third-party models. `timm` stands for every `timm:<architecture>`."""
    return registry.names()
