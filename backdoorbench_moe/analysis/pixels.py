"""Pixel values and routing: whether the patches that an expert takes are brighter or darker than the others.

Source: the question is that of Figure 7 of BadPatches (patch sums of the patches that are routed to an expert).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Difference, Mean, differences, means_of

BINS = 32


@dataclass(frozen=True)
class LayerPixels:
    """Brightness of the patches that each expert of one layer takes, over the clean test images.

    The brightness of a patch is its patch sum: the sum over its pixels of their mean over the channels, which is in
    [0, 1]. It lies between 0 and patch_size².

    Patches of one image are not independent, so `overall` and `by_class` overstate the evidence: their p-values
    are too small. `by_image` compares within each image and then averages over the images.

    Attributes:
        layer: Name of the layer.
        edges: (bins + 1,) float64, edges of the histogram bins, from 0 to patch_size².
        taken: (E, bins) int64, histograms of the patches that an expert takes.
        not_taken: (E, bins) int64, histograms of the patches that it does not take.
        overall: For each of the E experts, the difference between the patches that it takes and those that it
            does not; None if it takes all patches or none.
        by_class: The same for the images of each class.
        by_image: For each of the E experts, the mean sum of the taken patches minus that of the others, computed
            for each image and averaged over the images. Images of which an expert takes all patches or none are
            left out.
        by_image_share: (E,) in [0, 1], share of these images in which the difference is above 0.
    """

    layer: str
    edges: Tensor
    taken: Tensor
    not_taken: Tensor
    overall: tuple[Difference | None, ...]
    by_class: tuple[tuple[Difference | None, ...], ...]
    by_image: tuple[Mean, ...]
    by_image_share: Tensor


def layer_pixels(
    layer: LayerPass, sums: Tensor, labels: Tensor, classes: int, patch_size: int
) -> LayerPixels:
    """Compare the sums of the patches that each expert takes with the sums of the others.

    Args:
        layer: The layer's pass over the N clean test images.
        sums: (N, P) float64, patch sums.
        labels: (N,) int64, classes of the images.
        classes: Number of classes.
        patch_size: Side of a patch, in pixels.
    """
    selected = layer.selected
    edges = torch.linspace(0, patch_size**2, BINS + 1, dtype=torch.float64)
    bins = (sums / patch_size**2 * BINS).long().clamp(max=BINS - 1)
    taken = torch.stack([bins[chosen].bincount(minlength=BINS) for chosen in selected.unbind(1)])
    image = image_differences(selected, sums)
    return LayerPixels(
        layer=layer.layer,
        edges=edges,
        taken=taken,
        not_taken=bins.flatten().bincount(minlength=BINS) - taken,
        overall=_compare(selected, sums),
        by_class=tuple(_compare(selected[labels == c], sums[labels == c]) for c in range(classes)),
        by_image=means_of(image),
        by_image_share=(image > 0).double().sum(0) / (~image.isnan()).sum(0),
    )


def image_differences(selected: Tensor, sums: Tensor) -> Tensor:
    """For each image and expert, the mean sum of the taken patches minus that of the others.

    Args:
        selected: (N, E, P) bool, whether an expert takes a patch.
        sums: (N, P) float64, patch sums.

    Returns:
        (N, E) float64; NaN if an expert takes all patches of an image, or none.
    """
    values, taken = sums.unsqueeze(2), selected.double()
    inside = (taken @ values).squeeze(2)
    count, patches = taken.sum(-1), taken.shape[-1]
    apart = inside / count - (sums.sum(1, keepdim=True) - inside) / (patches - count)
    # The two sums over all patches can differ by rounding, and the quotient would be infinite.
    return apart.masked_fill((count == 0) | (count == patches), math.nan)


def _compare(selected: Tensor, sums: Tensor) -> tuple[Difference | None, ...]:
    groups = selected.transpose(0, 1).flatten(1)
    return tuple(differences(sums.flatten(), groups)) if len(sums) else (None,) * len(groups)
