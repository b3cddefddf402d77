"""Where patches go, over the whole test set: frequency, load, overlap, entropy, what nobody takes."""

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
    """What one routed layer does with the clean test images.

    grid: rows and columns of the P patches. gates_over: "patches", "experts" or "neither", the axis over which
    the gates sum to 1.
    frequency: (E, P) in [0, 1], share of images in which an expert takes a patch. by_class: (classes, E, P),
    the same for images of one class; NaN for a class without images.
    load: (E,) mean number of patches an expert takes. load_share: (E,) of all that are taken. load_cv:
    coefficient of variation of the load (standard deviation over mean, both over the experts; 0 is even).
    mass: (E,) mean sum of the gates of the patches an expert takes. mass_share, mass_cv: as for the load.
    overlap: (E, E) mean Jaccard index of two experts' choices.
    entropy: of the gates, as a share of the largest one, 0..1; mean over an image's distributions, then over
    the images. entropy_by_expert: (E,); None where the gates are over the experts.
    untaken: number of patches of an image that no expert takes. untaken_frequency: (P,) share of images in
    which no expert takes a patch. takers: (E + 1,) share of patches that exactly n experts take.
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
    """Statistics of one layer's pass over N images with these (N,) labels, on the CPU."""
    selected, experts = layer.selected, layer.selected.shape[1]
    counts = routing.counts_by_class(selected, labels, classes)
    sizes = labels.bincount(minlength=classes).double()
    frequency = counts.sum(0).double() / len(labels)
    load, mass = frequency.sum(-1), layer.kept.double().mean(0)
    takers = selected.sum(1)
    return LayerRouting(
        layer=layer.layer,
        grid=grid,
        gates_over=layer.gates_over,
        frequency=frequency,
        by_class=counts.double() / sizes[:, None, None],
        load=load,
        load_share=load / load.sum(),
        load_cv=variation(load),
        mass=mass,
        mass_share=mass / mass.sum(),
        mass_cv=variation(mass),
        overlap=mean_overlap(selected, selected),
        entropy=mean_of(layer.entropy.mean(1)),
        entropy_by_expert=None if layer.gates_over == "experts" else layer.entropy.double().mean(0),
        untaken=mean_of((takers == 0).sum(1)),
        untaken_frequency=(takers == 0).double().mean(0),
        takers=takers.flatten().bincount(minlength=experts + 1).double() / takers.numel(),
    )


def mean_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Mean over N images of every expert's Jaccard index with every one's: (N, E, P) and (N, F, P) to (E, F)."""
    parts = [
        routing.jaccard(a, b).double().sum(0)
        for a, b in zip(first.split(CHUNK), second.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum(0) / len(first)


def variation(values: Tensor) -> float:
    """Coefficient of variation of (E,) values: population standard deviation over mean; NaN for all zeros."""
    return (values.std(correction=0) / values.mean()).item()
