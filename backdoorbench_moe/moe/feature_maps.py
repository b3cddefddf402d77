"""Finding the feature maps of a model, and collecting them during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.layers import MoELayer
from backdoorbench_moe.moe.structure import Structured
from backdoorbench_moe.moe.temporary import hooked

# Norms are excluded, since they belong to the following layer as often as to the preceding one. Modules that may
# process attention weights are excluded because these have two dimensions of positions and no features.
LEFT_OUT = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Softmax, nn.Identity)


@dataclass(frozen=True)
class FeatureMap:
    """The output of a module, with features at every position of the image.

    Attributes:
        name: Dotted name of the module.
        positions: Number of positions: H * W of a map (B, C, H, W) or (B, H, W, C), or N of tokens (B, N, D).
        channels: The dimension of the features.
        composite: Whether the module has submodules.
    """

    name: str
    positions: int
    channels: int
    composite: bool


def find_feature_maps(
    model: nn.Module, images: Tensor, *, count: int, before_experts: bool = False
) -> list[FeatureMap]:
    """Choose feature maps of a model, in the order of computation.

    In a network with at least `count` resolutions, the outputs of the last block at each of the last `count`
    resolutions are chosen. In a network of equal blocks, such as a vision transformer, the outputs of `count` evenly
    spaced blocks are chosen, including the last. In any other network, the last outputs at each of the last
    resolutions are chosen, at most `count`.

    Args:
        model: The model, in evaluation mode; it is not changed.
        images: (B, 3, H, W) float in [0, 1], square.
        count: Number of maps, at least 1.
        before_experts: Whether to choose only maps that are computed before the first router or expert is called.

    Raises:
        ConfigError: The model has no feature map, or none before its experts.
    """
    found = list_feature_maps(model, images, before_experts=before_experts)
    if not found:
        where = " before its experts" if before_experts else ""
        raise ConfigError(f"model: expected feature maps{where}, {type(model).__name__} has none")
    composite = _last_ones([each for each in found if each.composite], shallowest=True)
    if len(composite) >= count:
        return composite[-count:]
    if blocks := _equal_blocks(model, found):
        wanted = min(count, len(blocks))
        return [blocks[(place + 1) * len(blocks) // wanted - 1] for place in range(wanted)]
    own = {each.positions: each for each in composite}
    return [own.get(each.positions, each) for each in _last_ones(found)][-count:]


def named_feature_maps(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[FeatureMap]:
    """Return the feature maps of the modules with the given names.

    Args:
        model: The model, in evaluation mode; it is not changed.
        images: (B, 3, H, W) float in [0, 1], square.
        names: Dotted names.

    Raises:
        ConfigError: A module does not exist, or its output is not a feature map.
    """
    check_names(model, names)
    found = {each.name: each for each in list_feature_maps(model, images)}
    for name in names:
        if name not in found:
            raise ConfigError(
                f"layers: the output of {name!r} is not a feature map: expected one tensor (B, C, H, W), (B, H, W, C) "
                "or (B, tokens, D), computed once for an image"
            )
    return [found[name] for name in names]


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise UnknownNameError if the model has no module with one of these names."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise UnknownNameError("layers", name, known)


@torch.no_grad()
def list_feature_maps(model: nn.Module, images: Tensor, *, before_experts: bool = False) -> list[FeatureMap]:
    """Return the feature maps of a model in the order in which they are computed, without the output of the model.

    For the parameters, see `find_feature_maps`.
    """
    found: dict[str, FeatureMap] = {}
    calls: dict[str, int] = {}
    routed: list[bool] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object, output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            each = _as_feature_map(name, module, output, len(images))
            if each is not None and not routed:
                found.pop(name, None)
                found[name] = each

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in _candidates(model)]
    if before_experts:
        hooks += [
            each.register_forward_pre_hook(lambda *_: routed.append(True)) for each in _routing_parts(model)
        ]
    with hooked(hooks):
        model(images)
    return [each for name, each in found.items() if calls[name] == 1]


@contextmanager
def collect_feature_maps(model: nn.Module, maps: Sequence[FeatureMap]) -> Iterator[list[Tensor]]:
    """Collect feature maps inside the block.

        with collect_feature_maps(model, maps) as features:
            logits = model(images)

    Yields:
        A list that each forward pass overwrites, in the order of `maps`: (B, C, positions), not detached.
    """
    features: list[Tensor] = [torch.empty(0)] * len(maps)

    def keep(place: int, channels: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            features[place] = output.movedim(channels, 1).flatten(2)

        return hook

    with hooked(
        model.get_submodule(each.name).register_forward_hook(keep(place, each.channels))
        for place, each in enumerate(maps)
    ):
        yield features


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose output may be a feature map: all except those in `LEFT_OUT` and those inside MoE layers."""
    inside = {id(m) for layer in model.modules() if isinstance(layer, MoELayer) for m in layer.modules()}
    inside -= {id(layer) for layer in model.modules() if isinstance(layer, MoELayer)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and id(module) not in inside and not isinstance(module, LEFT_OUT)
    ]


def _routing_parts(model: nn.Module) -> list[nn.Module]:
    """The routers, experts and MoE layers."""
    named = model.components() if isinstance(model, Structured) else {}
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return [*named.get("router", []), *named.get("experts", []), *layers]


def _as_feature_map(name: str, module: nn.Module, output: object, batch: int) -> FeatureMap | None:
    """Describe the output of a module for square images; return None if it has no positions."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != batch:
        return None
    shape = output.shape
    if output.ndim == 3:
        positions, channels = shape[1], 2
    elif shape[2] == shape[3]:
        positions, channels = shape[2] * shape[3], 1
    elif shape[1] == shape[2]:
        positions, channels = shape[1] * shape[2], 3
    else:
        return None
    if positions == 1:
        return None
    return FeatureMap(name, positions, channels, any(True for _ in module.children()))


def _last_ones(found: Sequence[FeatureMap], *, shallowest: bool = False) -> list[FeatureMap]:
    """The last map at each resolution, in the order of the resolutions; with `shallowest`, the last of the maps at the
    lowest nesting depth."""
    chosen: dict[int, FeatureMap] = {}
    for each in found:
        before = chosen.get(each.positions)
        if before is None or not shallowest or each.name.count(".") <= before.name.count("."):
            chosen[each.positions] = each
    return list(chosen.values())


def _equal_blocks(model: nn.Module, found: Sequence[FeatureMap]) -> list[FeatureMap]:
    """The longest sequence of composite modules whose outputs have equally many positions; empty if there is none."""
    maps = {each.name: each for each in found if each.composite}
    longest: list[FeatureMap] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            names = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            blocks = [maps[each] for each in names if each in maps]
            if len({each.positions for each in blocks}) == 1 and len(blocks) > max(1, len(longest)):
                longest = blocks
    return longest
