"""Losses and metrics of the experts that the patches changed by a trigger are sent to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers.losses import squared_variation
from backdoorbench_moe.moe.routed import Routing

Choice = Literal["patches", "experts", "nothing"]


def choice_of(routing: Routing) -> Choice:
    """Infer what is chosen in a routed layer, from the routing of at least two images.

    Returns:
        "nothing" if every expert processes every patch; "patches" if the number of patches per expert varies less than
        the number of experts per patch (expert choice); otherwise "experts" (token choice, with or without a capacity
        limit). In expert choice, the number of patches per expert may vary, because experts also select class tokens,
        which are not reported. Experts whose gates are all 0 are left out: they are masked, and choose nothing. If
        neither number varies, as when two experts have half of the patches each, patches choose if each has the experts
        with its largest gates.
    """
    active = (routing.gates > 0).any(2).any(0)
    gates, selected = routing.gates[:, active], routing.selected[:, active]
    by_expert, by_patch = selected.sum(-1), selected.sum(-2)
    if selected.all():
        return "nothing"
    across_experts, across_patches = (squared_variation(each.double()) for each in (by_expert, by_patch))
    if across_experts == across_patches == 0:
        least, largest_left = gates.masked_fill(~selected, 1).amin(1), gates.masked_fill(selected, 0).amax(1)
        return "patches" if (least < largest_left).any() else "experts"
    return "patches" if across_experts < across_patches else "experts"


def capture_loss(routing: Sequence[Routing], touched: Tensor, *, margin: float = 1.0) -> Tensor:
    """Compute a loss that falls as more experts select a patch that the trigger changes, for expert choice.

    For each expert, the loss is the hinge max(0, `margin` + threshold - best). Here, "best" is the largest log gate of
    a changed patch, and "threshold" is the smallest log gate that would be selected if the expert selected only other
    patches. Both are divided by the standard deviation of the other patches' log gates, so that the scale of the
    router does not matter.

    Args:
        routing: The routing of each layer, with gradients.
        touched: (P,) bool, the changed patches; at least one, but not all.
        margin: Margin in standard deviations.

    Returns:
        The mean over layers, images and experts; 0 if every expert selects a changed patch with the margin.
    """
    losses = []
    for layer in routing:
        scores = _log(layer.gates)
        others, own = scores[..., ~touched], scores[..., touched]
        places = min(int(layer.selected.sum(-1).max()), others.shape[-1])
        threshold = others.topk(places, dim=-1).values[..., -1]
        spread = others.detach().std(-1, correction=0).clamp(min=1e-12)
        losses.append(((threshold - own.amax(-1)) / spread + margin).relu().mean())
    return torch.stack(losses).mean()


def expert_loss(routing: Sequence[Routing], touched: Tensor, experts: Sequence[int]) -> Tensor:
    """Compute a loss that falls as the changed patches are sent to one expert of each layer.

    Args:
        routing: The routing of each layer, with gradients.
        touched: (P,) bool, the changed patches; at least one.
        experts: The target expert of each layer.

    Returns:
        The mean over layers, images and changed patches of -log of the expert's share of the gates of the patch.
    """
    losses = []
    for layer, expert in zip(routing, experts, strict=True):
        scores = _log(layer.gates[..., touched])
        losses.append((scores.logsumexp(-2) - scores[..., expert, :]).mean())
    return torch.stack(losses).mean()


def patch_losses(
    gates: Tensor, experts: Tensor, choice: Choice, places: int, *, margin: float = 1.0
) -> Tensor:
    """Compute a loss for each patch that falls as one expert becomes more likely to process the patch.

    If patches choose experts, the loss is -log of the expert's share of the gates of the patch, as in `expert_loss`. If
    experts choose patches, it is the hinge of `capture_loss`, where the other patches are all except this one, and the
    standard deviation is that of all log gates of the expert.

    Args:
        gates: (K, B, E, P), the gates of one layer for B images with each of K stamps, with gradients.
        experts: (K,) int64, the target expert of each stamp.
        choice: What is chosen in the layer, see `choice_of`; not "nothing".
        places: Number of patches that an expert selects, if experts choose patches.
        margin: Margin in standard deviations, if experts choose patches.

    Returns:
        (K, B, P).
    """
    scores = _log(gates)
    own = of_experts(scores, experts)
    if choice == "experts":
        return scores.logsumexp(-2) - own
    best = own.topk(min(places, own.shape[-1] - 1) + 1, dim=-1).values
    last, next_best = best[..., -2:-1], best[..., -1:]
    # Without a selected patch, the best patch that is not selected would take its place.
    threshold = torch.where(own >= last, next_best, last)
    spread = own.detach().std(-1, correction=0, keepdim=True).clamp(min=1e-12)
    return ((threshold - own) / spread + margin).relu()


def of_experts(values: Tensor, experts: Tensor) -> Tensor:
    """Return the values (K, B, P) of one expert for each of K stamps; values: (K, B, E, P), experts: (K,) int64."""
    return values[torch.arange(len(experts), device=experts.device), :, experts]


def captured_share(routing: Sequence[Routing], touched: Tensor) -> Tensor:
    """Return the share of experts, over all layers, that select a changed patch, for each image: (B,)."""
    return torch.cat([layer.selected[..., touched].any(-1) for layer in routing], 1).float().mean(1)


def expert_share(routing: Sequence[Routing], touched: Tensor, experts: Sequence[int]) -> Tensor:
    """Return the share of changed patches, over all layers, that the target expert processes, per image: (B,)."""
    taken = [layer.selected[:, e][..., touched] for layer, e in zip(routing, experts, strict=True)]
    return torch.cat(taken, 1).float().mean(1)


def least_used(routing: Sequence[Routing]) -> list[int]:
    """Return the expert of each layer that the fewest patches are sent to; of several, the first."""
    return [int(layer.selected.float().mean((0, 2)).argmin()) for layer in routing]


def _log(gates: Tensor) -> Tensor:
    gates = gates.float()
    return gates.clamp(min=torch.finfo(gates.dtype).tiny).log()
