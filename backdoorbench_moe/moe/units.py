"""Units of a model that can be masked or pruned: channels of norms, whole experts, and the experts' gates.

A mask is a factor from 0 to 1 for each unit. A masked model is computed with `torch.func.functional_call`, with weights
that are multiplied by the masks, so that gradients reach the masks and the model is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorbench_moe.moe.experts import active_experts
from backdoorbench_moe.moe.structure import Expert, Structured, WithExperts

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Units:
    """The n units of one norm, or of one routed layer.

    Attributes:
        kind: "channel" (of a norm), "expert" (its complete output) or "gate" (the expert's row of the router).
        layer: Dotted name of the norm, or of the routed layer.
        names: Names of the n units: the number of a channel, or the name of an expert.
        rows: By state-dict name, the unit of each row of the tensor: (rows,) int64 from 0 to n, where n stands for no
            unit. Multiplying the rows of a unit masks it; setting them to zero prunes it.
    """

    kind: Literal["channel", "expert", "gate"]
    layer: str
    names: tuple[str, ...]
    rows: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.names)


def norm_units(model: nn.Module) -> list[Units]:
    """Return the channels of all norms that have a scale for each channel: batch, layer and group norms.

    Only the scale is masked or pruned, so that a pruned channel has a constant output, the shift.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and isinstance(module.weight, Tensor) and module.weight.ndim == 1:
            count = len(module.weight)
            names = tuple(map(str, range(count)))
            found.append(Units("channel", name, names, {f"{name}.weight": torch.arange(count)}))
    return found


def expert_units(model: nn.Module) -> list[Units]:
    """Return the experts of each routed layer, with the rows of `Expert.output`; none for a dense model.

    Experts that are muted or masked already are left out: no mask has an effect on them.
    """
    state, found = model.state_dict(), []
    for layer, every in _by_layer(model).items():
        if not (experts := active_experts(model, every)):
            continue
        rows: dict[str, Tensor] = {}
        for number, expert in enumerate(experts):
            for name, (start, stop) in expert.output.items():
                rows.setdefault(name, torch.full((len(state[name]),), len(experts)))[start:stop] = number
        found.append(Units("expert", layer, tuple(e.name for e in experts), rows))
    return found


def gate_units(model: nn.Module) -> list[Units]:
    """Return the gates of each routed layer: the rows of its router's `weight` (E, D), which compute the logits.

    Routers without such a weight have no gates that can be masked. In particular, the slots of Soft MoE are scaled to
    length 1, so that a factor has no effect.
    """
    if not isinstance(model, Structured):
        return []
    routers, layers = model.components().get("router", []), _by_layer(model)
    if len(routers) != len(layers):
        return []
    places = {module: name for name, module in model.named_modules()}
    found = []
    for router, (layer, experts) in zip(routers, layers.items(), strict=True):
        weight = getattr(router, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and len(weight) == len(experts):
            rows = {f"{places[router]}.weight": torch.arange(len(experts))}
            found.append(Units("gate", layer, tuple(e.name for e in experts), rows))
    return found


def expert_ranges(model: nn.Module, name: str) -> list[tuple[str, int, int]]:
    """Return which rows of a tensor belong to which expert.

    Args:
        model: The model.
        name: The tensor's name in the state dict.

    Returns:
        (name, start, stop) for each expert that owns rows of the tensor; empty if no expert does.
    """
    experts = [expert for each in _by_layer(model).values() for expert in each]
    return [(expert.name, *expert.own[name]) for expert in experts if name in expert.own]


def masked_tensors(
    model: nn.Module, masks: Sequence[tuple[Units, Tensor]], shifts: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Multiply the rows of units by their masks.

    Args:
        model: The model, which is not changed.
        masks: Units and the factor of each, (n,), which may require gradients. Factors of the same row are multiplied.
        shifts: Factors of the shifts of norms, (channels,), by name of the norm.

    Returns:
        The changed tensors by state-dict name, for `torch.func.functional_call`.
    """
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for units, factors in masks:
        padded = torch.cat([factors, factors.new_ones(1)])
        for name, owners in units.rows.items():
            value = found.get(name, state[name])
            factor = padded[owners.to(padded.device)]
            found[name] = value * factor.view(-1, *[1] * (value.ndim - 1)).to(value.dtype)
    for layer, factors in (shifts or {}).items():
        name = f"{layer}.bias"
        if name in state:
            found[name] = found.get(name, state[name]) * factors
    return found


@torch.no_grad()
def prune(model: nn.Module, units: Units, numbers: Sequence[int]) -> None:
    """Set the rows of some units to zero, in place.

    Args:
        model: The model.
        units: The units.
        numbers: Indices of the units to prune, from 0 to n - 1.
    """
    state, chosen = model.state_dict(), torch.tensor(numbers, dtype=torch.int64)
    for name, owners in units.rows.items():
        rows = torch.isin(owners, chosen).nonzero().flatten()
        state[name].index_fill_(0, rows.to(state[name].device), 0)


def _by_layer(model: nn.Module) -> dict[str, list[Expert]]:
    """The experts of each routed layer, in order; empty for a model that does not implement `WithExperts`."""
    layers: dict[str, list[Expert]] = {}
    for expert in model.experts() if isinstance(model, WithExperts) else ():
        layers.setdefault(expert.layer, []).append(expert)
    return layers
