"""CLP: prune channels whose Lipschitz bound is far above that of their layer. It needs no images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.outlying import (
    check_deviations,
    groups_of,
    judge_groups,
    names_of,
    pruned_channels,
)
from backdoorbench_moe.defenses.requirements import treats_experts
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.norms import batch_norms
from backdoorbench_moe.moe.pairing import convolutions_before
from backdoorbench_moe.moe.pruning import silence
from backdoorbench_moe.moe.structure import Structured, channels_of
from backdoorbench_moe.moe.trial import noise_for
from backdoorbench_moe.moe.units import gate_units, prune
from backdoorbench_moe.ops.outliers import studentised


class CLP(Defense):
    """Channel Lipschitzness-based pruning: zero the channels that can amplify small changes of the input most.

    The bound of channel c is u_c = s(W_c) |gamma_c| / sqrt(var_c + eps): the largest singular value of the channel's
    kernel as a matrix (input channels, kernel positions), times the factor of the following batch norm. Channels with a
    bound above mean + `u` standard deviations of their layer get a scale and a shift of zero in this norm. No images
    are needed, and nothing is trained.

    Departures: a norm is paired with the convolutions whose outputs it normalises, which are found in one forward pass
    on noise. The original pairs it with the preceding convolution in the order in which modules were created, which is
    the wrong one in networks with shortcuts. In a pre-activation network, a norm precedes the convolution of its block;
    it is paired with the convolutions whose sum it normalises: the last one of the previous block, and its shortcut.
    The original's bound has no eps. The bound of a sum is the root of the sum of squares of s(W_c), which bounds the
    sum as a function of both inputs together. Identities in the sum are not counted, since they add the same to all
    channels. Convolutions that no norm follows are pruned only if the model names them as `prunable`; their bound is
    s(W_c).

    As an extension, hidden units of MLPs (`fc1`) are channels, too: the bound of a unit is the L2 norm of its row of
    weights. Layer norms have no running statistics and thus no bound, so transformers are pruned in their MLPs only.

    Args:
        u: Number of standard deviations above the mean beyond which a channel is pruned, above 0. Of n channels, none
            can be more than (n - 1) / sqrt(n) above their mean, so with `u` of 3 nothing is pruned in groups of fewer
            than 11; the judgement lists such groups as "too_small".
        experts: Whether experts are treated as units: channels are compared only with others of the same expert, and
            the rows of each router are compared, too. A row whose L2 norm is more than `u` standard deviations above
            that of the other rows is set to zero, so that the gate of its expert no longer depends on the input. As
            there are few experts, a row is compared with the mean and the deviation of the others, by a t distribution.
            False: as in the original, which has no experts. None: True if the model names its experts.

    Raises:
        ConfigError: A value is out of range, or the model has no such channels.

    Source:
        Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, section 4, and its code
        rkteddy/channel-Lipschitzness-based-pruning.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    tiny: ClassVar[Mapping[str, object]] = {"u": 1.0}

    def __init__(self, *, u: float = 3.0, experts: bool | None = None) -> None:
        super().__init__()
        self.u, self.experts = u, experts
        check_deviations(u, [10**9])

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no channels to compare, or too few for `u`."""
        experts = treats_experts(model, self.experts)
        layers = [*_norms(model), *_hidden_layers(model)]
        if not layers:
            raise ConfigError(
                f"model: {type(model).__name__} has neither convolutions with batch norms nor MLPs, "
                "so it has no channels whose Lipschitz bounds can be compared"
            )
        places = names_of(model)
        sizes = [
            len(group.scores)
            for layer in layers
            for group in groups_of(model, places[layer], torch.zeros(channels_of(layer)), experts=experts)
        ]
        check_deviations(self.u, sizes)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Find the convolutions before the norms with a forward pass on two images of noise."""
        return Cost(predicted=2)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Compute the bounds of all channels, and prune the outliers."""
        model, experts = task.model, treats_experts(task.model, self.experts)
        bounds = channel_bounds(model, task.image_size)
        groups = [
            group
            for layer, values in bounds.items()
            for group in groups_of(model, layer, values, experts=experts)
        ]
        judgements = [judge_groups(groups, self.u, "Lipschitz bound", {})]
        if experts:
            judgements += self._prune_gates(model)
        for layer, channels in pruned_channels(groups, self.u).items():
            silence(model.get_submodule(layer), torch.tensor(channels))
        return DefenseResult("pruned", model, tuple(judgements))

    def _prune_gates(self, model: nn.Module) -> list[Judgement]:
        """Set outlying rows of routers to zero; return the judgement, or an empty list if there are no gates."""
        scores: dict[str, float] = {}
        state = model.state_dict()
        for units in gate_units(model):
            [name] = units.rows
            found = studentised(state[name].double().norm(dim=1).cpu()).tolist()
            scores |= dict(zip(units.names, found, strict=True))
            prune(model, units, [number for number, score in enumerate(found) if score > self.u])
        if not scores:
            return []
        return [
            Judgement(
                "expert",
                f"the expert's row of the router is more than {self.u:g} standard deviations longer than the others",
                scores=scores,
                threshold=self.u,
                suspicious=[name for name, score in scores.items() if score > self.u],
            )
        ]


@torch.no_grad()
def channel_bounds(model: nn.Module, image_size: int) -> dict[str, Tensor]:
    """Compute the Lipschitz bound of every channel.

    Args:
        model: The model, in evaluation mode, with square images.
        image_size: Side of the images in pixels.

    Returns:
        (channels,) float64 by the name of the layer in which the channels are pruned: a norm, a layer that `prunable`
        names and no norm follows, or the first layer of an MLP.
    """
    with noise_for(model, image_size) as images:
        pairs = convolutions_before(model, images)
    bounds: dict[str, Tensor] = {}
    for name, convs in pairs.items():
        norm = model.get_submodule(name)
        squares = sum(spectral_norms(model.get_submodule(conv)) ** 2 for conv in convs)
        assert isinstance(norm, _BatchNorm) and isinstance(squares, Tensor) and norm.running_var is not None
        bounds[name] = (
            squares.sqrt() * norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()
        )
    followed = {model.get_submodule(conv) for convs in pairs.values() for conv in convs}
    places = names_of(model)
    alone = [layer for layer in _named_prunable(model) if layer not in followed]
    for layer in dict.fromkeys([*alone, *_hidden_layers(model)]):
        bounds[places[layer]] = spectral_norms(layer)
    return bounds


def spectral_norms(layer: nn.Module) -> Tensor:
    """Compute the largest singular value of each output channel's weights.

    Args:
        layer: A convolution, whose channel has a matrix (input channels of its group, kernel positions); or a linear
            layer, whose row is a matrix with one column.

    Returns:
        (channels,) float64.
    """
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().double()
    if weight.ndim == 2:
        return weight.norm(dim=1)
    return torch.linalg.matrix_norm(weight.flatten(2), ord=2)


def _norms(model: nn.Module) -> Sequence[nn.Module]:
    """The batch norms with a scale and statistics; none if the model has no convolutions."""
    if not any(isinstance(module, _ConvNd) for module in model.modules()):
        return []
    return list(batch_norms(model).values())


def _hidden_layers(model: nn.Module) -> list[nn.Module]:
    """The first layers of all MLPs: modules with the submodules `fc1`, `act` and `fc2`."""
    found = []
    for module in model.modules():
        parts = [getattr(module, name, None) for name in ("fc1", "act", "fc2")]
        if all(isinstance(part, nn.Module) for part in parts):
            first = parts[0]
            assert isinstance(first, nn.Module)
            if isinstance(getattr(first, "weight", None), nn.Parameter):
                found.append(first)
    return found


def _named_prunable(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, Structured):
        return []
    return [group.layer for groups in model.prunable().values() for group in groups]
