"""Pixel value against routing (the paper's Figure 7): are the patches an expert takes brighter or darker?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Difference, Mean, differences, means_of

BINS = 32


@dataclass(frozen=True)
class LayerPixels:
    """Patch sums of the clean test images: sum over a patch's pixels of their mean over the channels, in [0, 1].

    edges: (bins + 1,) shared borders of the histograms, 0 to patch_size². taken, not_taken: (E, bins) int64
    numbers of patches.
    overall: E differences between the patches an expert takes and those it does not. by_class: the same for
    the images of each class. None where an expert takes all or none. The patches of one image are not
    independent, so p and the effect sizes of these see more evidence than there is.
    by_image: E differences, mean of the patches taken minus mean of those not taken in one image, mean over
    images with its interval; by_image_share: (E,) share of images in which it is above 0. Images of which an
    expert takes all or none are left out.
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
    """Compare patch sums (N, P) of N images between what each expert takes and what it does not."""
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
    """Mean sum of the patches taken minus that of those not taken, by image and expert: (N, E) float64.

    NaN where an expert takes all patches of an image, or none.
    """
    values, taken = sums.unsqueeze(2), selected.double()
    inside = (taken @ values).squeeze(2)
    count, patches = taken.sum(-1), taken.shape[-1]
    return inside / count - (sums.sum(1, keepdim=True) - inside) / (patches - count)


def _compare(selected: Tensor, sums: Tensor) -> tuple[Difference | None, ...]:
    groups = selected.transpose(0, 1).flatten(1)
    return tuple(differences(sums.flatten(), groups)) if len(sums) else (None,) * len(groups)
