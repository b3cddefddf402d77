"""Channels whose score is far above the mean of their group, shared by CLP and BNP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.units import expert_ranges
from backdoorbench_moe.ops.outliers import deviations, largest_deviation
from backdoorbench_moe.ops.ranges import check_positive


@dataclass(frozen=True)
class Group:
    """Channels of one layer that are compared with each other.

    Attributes:
        layer: Dotted name of the norm or layer.
        expert: Name of the expert that the channels belong to; None if they belong to no single expert.
        start: Index of the first channel.
        scores: (channels,) float64.
    """

    layer: str
    expert: str | None
    start: int
    scores: Tensor

    @property
    def name(self) -> str:
        """Name of the layer, and of the expert if there is one."""
        return self.layer if self.expert is None else f"{self.layer} of {self.expert}"

    def far(self, u: float) -> list[int]:
        """Return the indices of the channels in the layer whose score is above mean + u standard deviations."""
        return [self.start + place for place in (deviations(self.scores) > u).nonzero().flatten().tolist()]

    def most(self) -> float:
        """Return the distance of the highest score from the mean, in standard deviations."""
        return deviations(self.scores).max().item()


def groups_of(model: nn.Module, layer: str, scores: Tensor, *, experts: bool) -> list[Group]:
    """Return the channels of a layer as one group, or as a group for each expert that owns some of them.

    Args:
        model: The model.
        layer: Dotted name of the norm or layer.
        scores: (channels,), one for each row of the layer's weight.
        experts: Whether to group the channels by expert.
    """
    scores = scores.double().cpu()
    ranges = expert_ranges(model, f"{layer}.weight") if experts else []
    if not ranges:
        return [Group(layer, None, 0, scores)]
    return [Group(layer, name, start, scores[start:stop]) for name, start, stop in ranges]


def check_deviations(u: float, sizes: Sequence[int]) -> None:
    """Check that a channel can be `u` standard deviations above the mean of its group.

    Args:
        u: The number of standard deviations.
        sizes: Numbers of channels of all groups.

    Raises:
        ConfigError: `u` is not positive, or so large that no channel of any group can be that far above the mean.
    """
    check_positive(u=u)
    if u >= (most := largest_deviation(max(sizes))):
        raise ConfigError.expected(
            "u", f"below {most:.2f}, the most that one of {max(sizes)} channels can be above their mean", u
        )


def pruned_channels(groups: Sequence[Group], u: float) -> dict[str, list[int]]:
    """Return the indices of the channels that are too far above the mean of their group, by the layer's name."""
    pruned: dict[str, list[int]] = {}
    for group in groups:
        if channels := group.far(u):
            pruned.setdefault(group.layer, []).extend(channels)
    return pruned


def judge_groups(groups: Sequence[Group], u: float, reason: str, details: Mapping[str, Any]) -> Judgement:
    """Return the finding about the model: the highest deviation in each group, and the channels that are pruned.

    Args:
        groups: All groups.
        u: The threshold in standard deviations.
        reason: What the score of a channel is, such as "Lipschitz bound".
        details: Further details; "pruned", "channels" and "too_small" are added. "too_small" names the groups that
            have too few channels for one of them to exceed the threshold.
    """
    return Judgement(
        "model",
        f"the {reason} of a channel is more than {u:g} standard deviations above the mean of its group",
        scores={group.name: group.most() for group in groups},
        threshold=u,
        suspicious=[group.name for group in groups if group.far(u)],
        details={
            "pruned": pruned_channels(groups, u),
            "channels": {group.name: len(group.scores) for group in groups},
            "too_small": [group.name for group in groups if largest_deviation(len(group.scores)) <= u],
            **details,
        },
    )


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the dotted name of every module of a model."""
    return {module: name for name, module in model.named_modules()}
