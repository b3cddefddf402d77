"""Two models' routing of the same images, beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.analysis.routing import mean_overlap
from backdoorbench_moe.analysis.subject import Subject
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.effects import Mean, means_of
from backdoorbench_moe.ops.routing import jaccard

CHUNK = 1000


@dataclass(frozen=True)
class LayerComparison:
    """One layer of the run's model against the same layer of the other's.

    same: E means over images of the Jaccard index of expert e's choice in one model with expert e's in the
    other. across: (E, E) means of every expert of the run's model with every one of the other's. Experts are
    not matched: where the two were trained apart, number e means nothing, and only `across` shows who is like
    whom.
    """

    layer: str
    same: tuple[Mean, ...]
    across: Tensor


@dataclass(frozen=True)
class Comparison:
    """Layer by layer on the N clean test images and on the M triggered ones (None without a trigger)."""

    clean: tuple[LayerComparison, ...]
    triggered: tuple[LayerComparison, ...] | None


def compare_layers(
    first: tuple[LayerPass, ...], second: tuple[LayerPass, ...]
) -> tuple[LayerComparison, ...]:
    """Compare two models' passes over the same images."""
    return tuple(
        LayerComparison(
            one.layer,
            means_of(_own_overlap(one.selected, other.selected)),
            mean_overlap(one.selected, other.selected),
        )
        for one, other in zip(first, second, strict=True)
    )


def _own_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Jaccard index of expert e with expert e: (N, E)."""
    parts = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    return torch.cat([jaccard(a, b).diagonal(dim1=1, dim2=2) for a, b in parts])


def check_comparable(first: Subject, second: Subject) -> None:
    """Raise ConfigError unless both models are dense, or route alike: same layers, experts and patches."""
    one, other = (_shape(subject) for subject in (first, second))
    if one != other:
        raise ConfigError(
            f"against: expected a model that routes as that of {first.name} ({_words(one)}), "
            f"got {second.name} ({_words(other)})"
        )


@torch.inference_mode()
def _shape(subject: Subject) -> list[tuple[str, int, int]]:
    """Name, experts and patches of each routed layer."""
    if subject.routed is None:
        return []
    output = forward_routed(subject.routed, subject.images.test.images[:1], precision=subject.precision)
    return [(one.layer, *one.selected.shape[1:]) for one in output.routing]


def _words(shape: list[tuple[str, int, int]]) -> str:
    parts = [f"{name}: {experts} experts, {patches} patches" for name, experts, patches in shape]
    return "; ".join(parts) or "dense"
