"""Building the dense vision transformer, and choosing the blocks whose MLPs are replaced."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.timm_models import TimmModel


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
    """Build the dense transformer. "timm:<vit>" with the same options and seed has the same weights.

    Args:
        vit: Name of the architecture in timm.
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels; None for the default of "timm:<vit>".
        depth: Number of blocks; None for the default of the architecture.
        embed_dim: Features of a token; None for the default of the architecture.
        num_heads: Attention heads; None for the default of the architecture.

    Raises:
        UnknownNameError: timm has no such architecture.
        ConfigError: The architecture is not a vision transformer with plain blocks and one classifier, or an option
            does not fit it.
    """
    sizes = {"patch_size": patch_size, "depth": depth, "embed_dim": embed_dim, "num_heads": num_heads}
    given = {name: value for name, value in sizes.items() if value is not None}
    try:
        model = create_model(f"timm:{vit}", num_classes=num_classes, image_size=image_size, **given)
    except ConfigError as error:
        if str(error).startswith("architecture: "):
            raise ConfigError(f"vit: {str(error).removeprefix('architecture: ')}") from error
        # All sizes of a plain transformer can be set, so that an error about one means that it is not plain, except if
        # its default patches do not fit.
        refused = str(error).startswith(tuple(f"{name}: timm's" for name in sizes))
        if refused and f"{vit!r} has patches of " not in str(error):
            raise _not_plain(vit) from error
        raise
    assert isinstance(model, TimmModel)
    try:
        model.mlps()
    except ConfigError as error:
        raise _not_plain(vit) from error
    network = model.network
    assert isinstance(network, VisionTransformer)
    # Transformers with a distillation token have two classifiers.
    if not isinstance(network.get_classifier(), nn.Linear):
        raise _not_plain(vit)
    return network


def _not_plain(vit: str) -> ConfigError:
    plain = "a vision transformer of timm's with a plain MLP in every block, such as vit_tiny_patch16_224"
    return ConfigError.expected("vit", plain, vit)


def choose_blocks(wanted: str | int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Return the numbers of the blocks whose MLPs are replaced, counted from 0, in ascending order.

    Args:
        wanted: "every-2" (1, 3, 5, ...) or "last-N" (the last N of these), both as in V-MoE; "all"; or one or several
            numbers, or a string such as "1,3,5".
        depth: Number of blocks.

    Raises:
        ConfigError: `wanted` is something else, or contains a block that does not exist, or a block twice.
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
