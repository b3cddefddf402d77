"""Models: images in, logits out; routed ones also say where they sent each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backdoorbench_moe.registry import Registry

if TYPE_CHECKING:
    from torch import nn

registry: Registry[nn.Module] = Registry("model")


def create_model(name: str, *, num_classes: int = 10, image_size: int = 32, **options: object) -> nn.Module:
    """Build the model called `name` for (B, 3, image_size, image_size) images in [0, 1].

    Weights come from torch's global generator; seed it first. "timm:<architecture>" builds any timm
    model from scratch. Raises UnknownNameError, ConfigError or PluginError.
    """
    return registry.create(name, options, {"num_classes": num_classes, "image_size": image_size})


def list_models() -> list[str]:
    """Names of all models, built-in and third-party; `timm` stands for every "timm:<architecture>"."""
    return registry.names()
