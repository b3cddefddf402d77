"""Routing as numbers: who takes which patch, how evenly, and what changes between two versions of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.ops.patches import tile

# How far from 1 the sum of gates may be, for gates that were computed in bf16.
SUM_TOLERANCE = 0.01


def gates_over(gates: Tensor) -> str:
    """Say over which axis the gates (B, E, P) are a distribution: "patches", "experts" or "neither".

    An expert that weighs the patches of an image has gates that sum to 1 over P; a patch that weighs the
    experts has gates that sum to 1 over E. Where both hold, "patches".
    """
    for name, dim in (("patches", -1), ("experts", -2)):
        if ((gates.float().sum(dim) - 1).abs() <= SUM_TOLERANCE).all():
            return name
    return "neither"


def distributions(gates: Tensor, over: str) -> Tensor:
    """Gates (B, E, P) as float64 that sum to exactly 1 over the experts, or else over the patches.

    over: as `gates_over` says; "neither" is brought to sum to 1 over the patches. What sums to 0 stays 0.
    """
    dim = _axis(over)
    gates = gates.double()
    return gates / gates.sum(dim, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def normalised_entropy(probabilities: Tensor, over: str) -> Tensor:
    """Entropy of (B, E, P) distributions as a share of the largest one, in [0, 1]; 0 where there is one choice.

    Returns (B, E) for distributions over the patches, (B, P) for those over the experts.
    """
    dim = _axis(over)
    choices = torch.tensor(max(2, probabilities.shape[dim]))
    return torch.special.entr(probabilities).sum(dim) / choices.log()


def js_divergence(first: Tensor, second: Tensor, over: str) -> Tensor:
    """Jensen-Shannon divergence in nats of (B, E, P) distributions, by expert: (B, E) in [0, ln 2].

    Over the patches: that of each expert's two distributions. Over the experts: each expert's term of the
    divergence, mean over the patches, so that the sum over E is the mean divergence of a patch.
    """
    middle = (first + second) / 2
    terms = torch.special.entr(middle) - (torch.special.entr(first) + torch.special.entr(second)) / 2
    terms = terms.clamp(min=0)
    return terms.mean(-1) if over == "experts" else terms.sum(-1)


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Jaccard index of every expert's choice in (B, E, P) bool with every one's in (B, F, P): (B, E, F).

    Two experts that took nothing chose the same: 1.
    """
    one, other = first.float(), second.float()
    common = one @ other.transpose(1, 2)
    union = one.sum(-1).unsqueeze(2) + other.sum(-1).unsqueeze(1) - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def changed_share(first: Tensor, second: Tensor) -> Tensor:
    """Share of each expert's selected patches that differ between two selections (B, E, P) bool: (B, E).

    |A xor B| / (|A| + |B|), which is the share of K that was exchanged where both hold K; 0 where both are
    empty.
    """
    size = first.sum(-1) + second.sum(-1)
    return (first ^ second).sum(-1) / size.clamp(min=1)


def counts_by_class(selected: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images of each class had each patch taken by each expert: (classes, E, P) int64.

    selected: (N, E, P) bool. labels: (N,) int64.
    """
    counts = torch.zeros(classes, *selected.shape[1:], dtype=torch.int64, device=selected.device)
    return counts.index_add_(0, labels, selected.long())


def blind_miss(changed: Tensor, taken: Tensor, patches: int) -> Tensor:
    """Probability that an expert that picks blindly takes none of the changed patches: (B, E) float64.

    changed: (B,) number of changed patches m. taken: (B, E) number K an expert picks of the P `patches`,
    each set of K equally likely: C(P - m, K) / C(P, K), the hypergeometric probability of no hit.
    """
    m, k = changed.double().unsqueeze(1), taken.double()
    others = patches - m
    log = torch.lgamma(others + 1) - torch.lgamma((others - k).clamp(min=0) + 1)
    log = log - (torch.lgamma(torch.tensor(patches + 1.0).double()) - torch.lgamma(patches - k + 1))
    return torch.where(k > others, 0.0, log.exp().clamp(max=1))


def changed_patches(clean: Tensor, triggered: Tensor, size: int) -> Tensor:
    """Which patches differ in any pixel: (B, P) bool of two (B, C, H, W) uint8 images, tiles of `size`."""
    differs = (clean != triggered).any(1, keepdim=True)
    return tile(differs, size).flatten(1).any(1).unflatten(0, (len(clean), -1))


def patch_sums(images: Tensor, size: int) -> Tensor:
    """Sum over a patch's pixels of their mean over the channels: (B, P) float64 in [0, size * size].

    images: (B, C, H, W) uint8, taken as [0, 1].
    """
    sums = tile(images.sum(1, keepdim=True, dtype=torch.int32), size).flatten(1).sum(1)
    return sums.unflatten(0, (len(images), -1)).double() / (255 * images.shape[1])


def _axis(over: str) -> int:
    return -2 if over == "experts" else -1
