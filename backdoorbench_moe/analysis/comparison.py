"""Comparison of the routing of the same images in two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass, PairedPass
from backdoorbench_moe.analysis.routing import mean_overlap
from backdoorbench_moe.engine.inference import forward_routed
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.effects import Mean, means_of
from backdoorbench_moe.ops.routing import jaccard

CHUNK = 1000


@dataclass(frozen=True)
class LayerComparison:
    """Overlap of the experts' selections in one layer of the run's model and of the other model.

    The experts of the two models are not matched. If the models were trained separately, experts of the same index are
    unrelated, and `across` shows which experts are similar.

    Attributes:
        layer: Name of the layer.
        same: For each of the E experts, the Jaccard index of its selection and that of the expert of the same index in
            the other model, in [0, 1], mean over the images.
        across: (E, E) in [0, 1], the same for each expert of the run's model (row) and each expert of the other model
            (column).
    """

    layer: str
    same: tuple[Mean, ...]
    across: Tensor


@dataclass(frozen=True)
class RoutingComparison:
    """Comparison of two models, layer by layer.

    Attributes:
        clean: The layers, on the clean test images.
        triggered: The layers, on the triggered images that count for ASR; None without a trigger.
    """

    clean: tuple[LayerComparison, ...]
    triggered: tuple[LayerComparison, ...] | None


def compare_passes(first: PairedPass, second: PairedPass) -> RoutingComparison:
    """Compare the passes of two models over the same images."""
    triggered = None
    if first.triggered is not None and second.triggered is not None:
        triggered = compare_layers(first.triggered.layers, second.triggered.layers)
    return RoutingComparison(compare_layers(first.clean.layers, second.clean.layers), triggered)


def compare_layers(
    first: tuple[LayerPass, ...], second: tuple[LayerPass, ...]
) -> tuple[LayerComparison, ...]:
    """Compare the layers of two models' passes over the same images."""
    return tuple(
        LayerComparison(
            one.layer,
            means_of(_overlap_of_same_number(one.selected, other.selected)),
            mean_overlap(one.selected, other.selected),
        )
        for one, other in zip(first, second, strict=True)
    )


def _overlap_of_same_number(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jaccard index (N, E) of the selections of expert e in two models, given as (N, E, P) bool."""
    parts = zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    return torch.cat([jaccard(a, b).diagonal(dim1=1, dim2=2) for a, b in parts])


def check_comparable(first: OpenedRun, second: OpenedRun) -> None:
    """Check that two models have the same routed layers, with the same numbers of experts and patches.

    Raises:
        ConfigError: They differ. Two dense models, which have no routed layers, are comparable.
    """
    one, other = (_routed_layers(opened) for opened in (first, second))
    if one != other:
        raise ConfigError(
            f"against: expected a model with the routed layers of {first.name} ({_describe(one)}), "
            f"got {second.name} ({_describe(other)})"
        )


@torch.inference_mode()
def _routed_layers(opened: OpenedRun) -> list[tuple[str, int, int]]:
    """Return name, number of experts and number of patches of each routed layer."""
    if opened.routed is None:
        return []
    output = forward_routed(opened.routed, opened.data.test.images[:1], precision=opened.precision)
    return [(layer.layer, *layer.selected.shape[1:]) for layer in output.routing]


def _describe(layers: list[tuple[str, int, int]]) -> str:
    parts = [f"{name}: {experts} experts, {patches} patches" for name, experts, patches in layers]
    return "; ".join(parts) or "dense"
