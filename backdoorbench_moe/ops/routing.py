"""Statistics of routing: load, entropy, and differences between classes and between pairs of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backdoorbench_moe.ops.patches import tile

# Largest deviation from 1 of the sum of gates that form a distribution; gates may have been computed in bf16.
SUM_TOLERANCE = 0.01


def gates_over(gates: Tensor) -> str:
    """Determine the axis over which gates sum to 1.

    In expert-choice routing the gates of each expert usually sum to 1 over the patches. In token-choice routing the
    gates of each patch usually sum to 1 over the experts.

    Args:
        gates: (B, E, P).

    Returns:
        "patches", "experts" or "neither"; "patches" if they sum to 1 over both.
    """
    for name, dim in (("patches", -1), ("experts", -2)):
        if ((gates.float().sum(dim) - 1).abs() <= SUM_TOLERANCE).all():
            return name
    return "neither"


def distributions(gates: Tensor, over: str) -> Tensor:
    """Normalise gates so that they sum to exactly 1 over an axis.

    Args:
        gates: (B, E, P), not negative.
        over: As returned by `gates_over`. For "neither", gates are normalised over the patches.

    Returns:
        (B, E, P) float64. Gates that sum to 0 stay 0.
    """
    dim = _axis(over)
    gates = gates.double()
    return gates / gates.sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def normalised_entropy(probabilities: Tensor, over: str) -> Tensor:
    """Compute the entropy of distributions, divided by the largest possible entropy.

    Args:
        probabilities: (B, E, P), as returned by `distributions`.
        over: The axis of the distributions, see `gates_over`.

    Returns:
        (B, E) for distributions over the patches, (B, P) for distributions over the experts; in [0, 1]. 0 if there is
        only one patch or only one expert.
    """
    dim = _axis(over)
    choices = torch.tensor(max(2, probabilities.shape[dim]))
    return torch.special.entr(probabilities).sum(dim) / choices.log()


def js_divergence(first: Tensor, second: Tensor, over: str) -> Tensor:
    """Compute the Jensen-Shannon divergence between two routings of the same images, for each expert.

    If each expert has a distribution over the patches, the result is the divergence between its two distributions. If
    each patch has a distribution over the experts, the divergence of a patch is a sum with one term for each expert,
    and the result is the mean of an expert's term over the patches.

    Args:
        first: (B, E, P) distributions.
        second: (B, E, P) distributions.
        over: The axis of the distributions, see `gates_over`.

    Returns:
        (B, E) in nats, in [0, ln 2].
    """
    middle = (first + second) / 2
    terms = torch.special.entr(middle) - (torch.special.entr(first) + torch.special.entr(second)) / 2
    terms = terms.clamp(min=0)
    return terms.mean(-1) if over == "experts" else terms.sum(-1)


def kl_divergence(gates: Tensor, reference: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the Kullback-Leibler divergence of the routing of each patch from a reference: sum_e p_e log(p_e / q_e).

    Args:
        gates: (B, E, P), the distribution q over the experts of each patch. It may require gradients.
        reference: (E, P) or (B, E, P), the distribution p; (E, 1) if it is the same for all patches.
        weights: (B, P), the weights of the patches of each image, or of the positions of each text, which sum to 1;
            None for the mean over all of them.

    Returns:
        The mean over images and patches in nats, a scalar, not negative. An expert with p_e = 0 contributes 0; q_e = 0
        counts as the smallest positive number.
    """
    gates, reference = gates.float(), reference.float()
    logs = gates.clamp(min=torch.finfo(gates.dtype).tiny).log()
    found = -(torch.special.entr(reference) + reference * logs).sum(-2)
    return found.mean() if weights is None else (weights * found).sum(-1).mean()


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Jaccard index of the selected patches for each pair of an expert of `first` and one of `second`.

    Args:
        first: (B, E, P) bool, the patches that each of E experts selected.
        second: (B, F, P) bool, the patches that each of F experts selected.

    Returns:
        (B, E, F) in [0, 1]; 1 if both experts selected nothing.
    """
    one, other = first.float(), second.float()
    common = one @ other.transpose(1, 2)
    union = one.sum(-1).unsqueeze(2) + other.sum(-1).unsqueeze(1) - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def changed_share(first: Tensor, second: Tensor) -> Tensor:
    """Compute, for each expert, how much two selections of patches differ: |A xor B| / (|A| + |B|).

    If A and B both have K patches, it is the share of the K patches that are not in the other selection.

    Args:
        first: (B, E, P) bool.
        second: (B, E, P) bool.

    Returns:
        (B, E) in [0, 1]; 0 if both selections are empty.
    """
    size = first.sum(-1) + second.sum(-1)
    return (first ^ second).sum(-1) / size.clamp(min=1)


def counts_by_class(selected: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the images of each class in which an expert selected a patch.

    Args:
        selected: (B, E, P) bool.
        labels: (B,) int64.
        classes: Number of classes.

    Returns:
        (classes, E, P) int64.
    """
    counts = torch.zeros(classes, *selected.shape[1:], dtype=torch.int64, device=selected.device)
    return counts.index_add_(0, labels, selected.long())


def load_shares(weights: Tensor, over: str) -> Tensor:
    """Compute the share of an image's (expert, patch) pairs that belongs to each expert, or to each patch.

    Args:
        weights: (B, E, P), not negative: 1 for pairs that are selected and 0 for others, or any other weights.
        over: "experts" or "patches".

    Returns:
        (B, E) or (B, P) float64, which sum to 1; zeros for an image whose weights are 0.
    """
    sums = weights.double().sum(2 if over == "experts" else 1)
    return sums / sums.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def load_entropy(load: Tensor) -> Tensor:
    """Compute the entropy of loads (B, n), divided by log n, its maximum: (B,) in [0, 1]; 0 if n is 1."""
    return torch.special.entr(load).sum(1) / math.log(max(2, load.shape[1]))


def nearest_load(loads: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """Compute the distance of an image's loads from the most similar ones of known images.

    Args:
        loads: For each routed layer (B, n), the loads of the images.
        known: For each routed layer (M, n), the loads of the known images.

    Returns:
        (B,) float64 in [0, 1]: the smallest distance to one of the M images. The distance between two images is the
        total variation distance between their loads, averaged over the layers.
    """
    pairs = zip(loads, known, strict=True)
    return torch.stack([torch.cdist(load, other, p=1) / 2 for load, other in pairs]).mean(0).amin(1)


def blind_miss(changed: Tensor, taken: Tensor, patches: int) -> Tensor:
    """Compute the probability that a random selection of K out of P patches contains none of m changed patches.

    All sets of K patches are equally likely, so the probability is hypergeometric: C(P - m, K) / C(P, K).

    Args:
        changed: (B,), the number m of changed patches in each image.
        taken: (B, E), the number K of patches that each expert selects.
        patches: The number P of patches in an image.

    Returns:
        (B, E) float64.
    """
    m, k = changed.double().unsqueeze(1), taken.double()
    others = patches - m
    log = torch.lgamma(others + 1) - torch.lgamma((others - k).clamp(min=0) + 1)
    log = log - (torch.lgamma(torch.tensor(patches + 1.0).double()) - torch.lgamma(patches - k + 1))
    return torch.where(k > others, 0.0, log.exp().clamp(max=1))


def changed_patches(clean: Tensor, triggered: Tensor, size: int) -> Tensor:
    """Find the patches that a trigger changes.

    Args:
        clean: (B, C, H, W) uint8.
        triggered: (B, C, H, W) uint8, the same images with the trigger.
        size: Side of a patch in pixels, a divisor of H and W.

    Returns:
        (B, P) bool, True if any pixel differs.
    """
    differs = (clean != triggered).any(1, keepdim=True)
    return _by_image(tile(differs, size).flatten(1).any(1), clean, size)


def patch_sums(images: Tensor, size: int) -> Tensor:
    """Compute the sum of the grey values of each patch's pixels.

    Args:
        images: (B, C, H, W) uint8. The grey value of a pixel is its mean over the channels, divided by 255.
        size: Side of a patch in pixels, a divisor of H and W.

    Returns:
        (B, P) float64 in [0, size * size].
    """
    sums = tile(images.sum(1, keepdim=True, dtype=torch.int32), size).flatten(1).sum(1)
    return _by_image(sums, images, size).double() / (255 * images.shape[1])


def _by_image(values: Tensor, images: Tensor, size: int) -> Tensor:
    """Reshape one value for each patch from (B * P,) to (B, P). B may be 0."""
    height, width = images.shape[-2:]
    return values.view(len(images), (height // size) * (width // size))


def _axis(over: str) -> int:
    return -2 if over == "experts" else -1
