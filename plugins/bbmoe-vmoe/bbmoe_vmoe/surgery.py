"""A timm vision transformer, taken apart: which blocks there are, and which get experts."""

from __future__ import annotations

from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model


def build_vit(
    vit: str,
    *,
    num_classes: int,
    image_size: int,
    patch_size: int | None,
    depth: int | None,
    embed_dim: int | None,
    num_heads: int | None,
) -> VisionTransformer:
    """The dense transformer, as "timm:<vit>" with these options builds it from the same random stream.

    Raises UnknownNameError for a name timm lacks; ConfigError for one that is no vision transformer of plain
    blocks, and for options that do not fit it.
    """
    sizes = {"patch_size": patch_size, "depth": depth, "embed_dim": embed_dim, "num_heads": num_heads}
    given = {name: value for name, value in sizes.items() if value is not None}
    try:
        model = create_model(f"timm:{vit}", num_classes=num_classes, image_size=image_size, **given)
    except ConfigError as error:
        if str(error).startswith("architecture: "):
            raise ConfigError(f"vit: {str(error).removeprefix('architecture: ')}") from error
        # A plain transformer lets all of its sizes be chosen.
        if str(error).startswith(tuple(f"{name}: timm's" for name in sizes)):
            raise _not_plain(vit) from error
        raise
    network = model.network
    if not isinstance(network, VisionTransformer) or type(network.patch_embed) is not PatchEmbed:
        raise _not_plain(vit)
    if not all(map(_is_plain, network.blocks)):
        raise _not_plain(vit)
    return network


def _not_plain(vit: str) -> ConfigError:
    plain = "a vision transformer of timm's with a plain MLP in every block, such as vit_tiny_patch16_224"
    return ConfigError.expected("vit", plain, vit)


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's usual one, with two linear layers and nothing but an activation between."""
    mlp = getattr(block, "mlp", None)
    return (
        type(block) is Block
        and type(mlp) is Mlp
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.norm, nn.Identity)
        and mlp.fc1.bias is not None
        and mlp.fc2.bias is not None
    )


def choose_blocks(wanted: str | int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The numbers, from 0 and ascending, of the blocks that get experts.

    wanted: "every-2" (all odd ones), "last-N" (the last N odd ones), both as in V-MoE; "all"; or numbers: one,
    a list, or a text such as "1,3,5". Raises ConfigError for anything else and for blocks that do not exist.
    """
    odd = tuple(range(1, depth, 2))
    if wanted == "all":
        return tuple(range(depth))
    if isinstance(wanted, str) and wanted.startswith("last-") and wanted[5:].isdecimal():
        count = int(wanted[5:])
        if not 1 <= count <= len(odd):
            raise ConfigError.expected(
                "moe_blocks", f"last-1 to last-{len(odd)}: of {depth} blocks, {len(odd)} are odd", wanted
            )
        return odd[-count:]
    chosen = odd if wanted == "every-2" else _numbers(wanted)
    if not chosen or not all(0 <= number < depth for number in chosen) or len(set(chosen)) < len(chosen):
        raise ConfigError.expected(
            "moe_blocks", f"blocks from 0 to {depth - 1}, each once, at least one", wanted
        )
    return tuple(sorted(chosen))


def _numbers(wanted: str | int | tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(wanted, str):
        return (wanted,) if isinstance(wanted, int) else wanted
    try:
        return tuple(int(part) for part in wanted.split(","))
    except ValueError:
        raise ConfigError.expected(
            "moe_blocks", "every-2, last-N, all, or block numbers such as 1,3", wanted
        ) from None
