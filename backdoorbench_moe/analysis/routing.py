"""Routing statistics of the clean test images: frequency, load, overlap, entropy, patches without an expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops import routing
from backdoorbench_moe.ops.effects import Mean, mean_of

CHUNK = 1000


@dataclass(frozen=True)
class LayerRouting:
    """Routing in one routed layer, over the clean test images.

    An expert takes a patch if the patch is routed to it. The coefficient of variation is the population standard
    deviation divided by the mean, both over the experts; 0 is perfectly even.

    Attributes:
        layer: Name of the layer.
        grid: Rows and columns of the P patches.
        gates_over: Axis over which the gates sum to 1: "patches", "experts" or "neither".
        frequency: (E, P) in [0, 1], share of images in which an expert takes a patch.
        by_class: (classes, E, P), the same for the images of one class; NaN for a class without images.
        load: (E,) mean number of patches of an image that an expert takes.
        load_share: (E,) in [0, 1], the load as a share of the total load.
        load_cv: Coefficient of variation of the load.
        mass: (E,) gate mass: sum of the gates of the patches that an expert takes, mean over the images.
        mass_share: (E,) in [0, 1], the gate mass as a share of the total.
        mass_cv: Coefficient of variation of the gate mass.
        overlap: (E, E) in [0, 1], Jaccard index of the patches that two experts take, mean over the images.
        entropy: Normalised entropy of the gates, in [0, 1], mean over an image's distributions and then over the
            images.
        entropy_by_expert: (E,) the same for each expert; None if the gates sum to 1 over the experts.
        untaken: Number of patches of an image that no expert takes.
        untaken_frequency: (P,) in [0, 1], share of images in which no expert takes a patch.
        takers: (E + 1,) in [0, 1], share of patches that exactly 0, 1, ..., E experts take.
    """

    layer: str
    grid: tuple[int, int]
    gates_over: str
    frequency: Tensor
    by_class: Tensor
    load: Tensor
    load_share: Tensor
    load_cv: float
    mass: Tensor
    mass_share: Tensor
    mass_cv: float
    overlap: Tensor
    entropy: Mean
    entropy_by_expert: Tensor | None
    untaken: Mean
    untaken_frequency: Tensor
    takers: Tensor


def layer_routing(layer: LayerPass, labels: Tensor, classes: int, grid: tuple[int, int]) -> LayerRouting:
    """Compute the routing statistics of one layer.

    Args:
        layer: The layer's pass over the N clean test images.
        labels: (N,) int64, classes of the images, on the CPU.
        classes: Number of classes.
        grid: Rows and columns of the patches.
    """
    selected, experts = layer.selected, layer.selected.shape[1]
    counts = routing.counts_by_class(selected, labels, classes)
    sizes = labels.bincount(minlength=classes).double()
    frequency = counts.sum(0).double() / len(labels)
    load, mass = frequency.sum(-1), layer.gate_mass.double().mean(0)
    takers = selected.sum(1)
    return LayerRouting(
        layer=layer.layer,
        grid=grid,
        gates_over=layer.gates_over,
        frequency=frequency,
        by_class=counts.double() / sizes[:, None, None],
        load=load,
        load_share=load / load.sum(),
        load_cv=coefficient_of_variation(load),
        mass=mass,
        mass_share=mass / mass.sum(),
        mass_cv=coefficient_of_variation(mass),
        overlap=mean_overlap(selected, selected),
        entropy=mean_of(layer.entropy.mean(1)),
        entropy_by_expert=None if layer.gates_over == "experts" else layer.entropy.double().mean(0),
        untaken=mean_of((takers == 0).sum(1)),
        untaken_frequency=(takers == 0).double().mean(0),
        takers=takers.flatten().bincount(minlength=experts + 1).double() / takers.numel(),
    )


def mean_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Jaccard index of the patches that two experts take, mean over the images, for each pair of experts.

    Args:
        first: (N, E, P) bool, patches that the first experts take.
        second: (N, F, P) bool, patches that the second experts take.

    Returns:
        (E, F) float64 in [0, 1].
    """
    parts = [
        routing.jaccard(a, b).double().sum(0)
        for a, b in zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum(0) / len(first)


def coefficient_of_variation(values: Tensor) -> float:
    """Compute the coefficient of variation of (E,) values; NaN if all of them are 0."""
    return (values.std(correction=0) / values.mean()).item()
