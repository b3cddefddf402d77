"""Which of timm's architectures can be merged: vision transformers with a plain MLP in every block."""

from __future__ import annotations

from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from backdoorbench_moe.errors import ConfigError

PLAIN_MLP = "two linear layers with biases and only an activation between them"


def plain_transformer(network: nn.Module, architecture: str) -> VisionTransformer:
    """Return a network of timm if it is a vision transformer with plain blocks.

    Args:
        network: The network.
        architecture: Its name in timm, for the error message.

    Raises:
        ConfigError: The network is something else; the message describes the difference.
    """
    if reason := _why_not(network):
        raise ConfigError(f"model: timm's {architecture!r} cannot be merged: {reason}")
    assert isinstance(network, VisionTransformer)
    return network


def _why_not(network: nn.Module) -> str | None:
    """Return why the network cannot be merged, or None if it can."""
    if not isinstance(network, VisionTransformer):
        if not any(isinstance(module, Mlp) for module in network.modules()):
            return f"it has no MLPs of {PLAIN_MLP}"
        if _resolutions(network) > 1:
            return "its MLPs are at several resolutions, and all of them must have the same patches"
        return "it is not a plain vision transformer of timm, such as vit_tiny_patch16_224"
    if type(network.patch_embed) is not PatchEmbed:
        return f"its patches are computed by {type(network.patch_embed).__name__}, not by one convolution"
    for number, block in enumerate(network.blocks):
        if not _is_plain(block):
            return f"its block {number} is not plain, with an MLP of {PLAIN_MLP}"
    return None


def _resolutions(network: nn.Module) -> int:
    """Return the number of different resolutions of the feature maps that timm lists."""
    info = getattr(network, "feature_info", [])
    return len({stage["reduction"] for stage in info if isinstance(stage, dict)})


def _is_plain(block: nn.Module) -> bool:
    mlp = getattr(block, "mlp", None)
    return (
        type(block) is Block
        and type(mlp) is Mlp
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.norm, nn.Identity)
        and mlp.fc1.bias is not None
        and mlp.fc2.bias is not None
    )
