"""Which experts the patches that a trigger changes are sent to, as losses and as shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers.losses import squared_variation
from backdoorbench_moe.moe.routed import Routing

Choice = Literal["patches", "experts", "nothing"]


def choice_of(routing: Routing) -> Choice:
    """What a routed layer lets choose, from the routing of at least two images.

    Returns:
        "nothing" if every expert processes every patch; "patches" if the numbers of patches that the experts select are
        more even than the numbers of experts that select a patch (expert choice); otherwise "experts" (token choice,
        with or without a limit of the experts' capacity). In expert choice the former numbers are not all equal if
        class tokens, which are not reported, are among the tokens that an expert selects.
    """
    selected = routing.selected
    by_expert, by_patch = selected.sum(-1), selected.sum(-2)
    if selected.all():
        return "nothing"
    if squared_variation(by_expert.double()) < squared_variation(by_patch.double()):
        return "patches"
    return "experts"


def capture_loss(routing: Sequence[Routing], touched: Tensor, *, margin: float = 1.0) -> Tensor:
    """A loss that falls as more experts select one of the patches that a trigger changes, for expert choice.

    For each expert it is the hinge max(0, `margin` + threshold - best). "Best" is the largest log gate of a changed
    patch, and "threshold" the smallest of the log gates with which the expert would fill all its places from the other
    patches. Both are divided by the standard deviation of the others' log gates, so that the scale of the router does
    not matter.

    Args:
        routing: The routing of each layer, with gradients.
        touched: (P,) bool, the changed patches; neither none nor all.
        margin: In standard deviations.

    Returns:
        The mean over layers, images and experts; 0 if all experts are captured with the margin.
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
    """A loss that falls as the changed patches are sent to one expert of each layer.

    Args:
        routing: The routing of each layer, with gradients.
        touched: (P,) bool, the changed patches; at least one.
        experts: The wanted expert of each layer.

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
    """A loss for each patch that falls as one expert becomes more likely to process the patch.

    Where patches choose experts, it is -log of the expert's share of the gates of the patch, as in `expert_loss`. Where
    experts choose patches, it is the hinge of `capture_loss`, in which the others are all patches but this one, and the
    standard deviation is that of all log gates of the expert.

    Args:
        gates: (K, B, E, P), the gates of one layer for B images with each of K stamps, with gradients.
        experts: (K,) int64, the wanted expert of each stamp.
        choice: What the layer lets choose, see `choice_of`; not "nothing".
        places: Number of patches that an expert selects, if experts choose patches.
        margin: In standard deviations, if experts choose patches.

    Returns:
        (K, B, P).
    """
    scores = _log(gates)
    own = of_experts(scores, experts)
    if choice == "experts":
        return scores.logsumexp(-2) - own
    best = own.topk(min(places, own.shape[-1] - 1) + 1, dim=-1).values
    last, next_best = best[..., -2:-1], best[..., -1:]
    # Without a patch that has a place, the last place would go to the best patch that has none.
    threshold = torch.where(own >= last, next_best, last)
    spread = own.detach().std(-1, correction=0, keepdim=True).clamp(min=1e-12)
    return ((threshold - own) / spread + margin).relu()


def of_experts(values: Tensor, experts: Tensor) -> Tensor:
    """Pick the values (K, B, P) of one expert for each of K stamps; values: (K, B, E, P), experts: (K,) int64."""
    return values[torch.arange(len(experts), device=experts.device), :, experts]


def captured_share(routing: Sequence[Routing], touched: Tensor) -> Tensor:
    """The share of experts, over all layers, that select a changed patch, for each image: (B,)."""
    return torch.cat([layer.selected[..., touched].any(-1) for layer in routing], 1).float().mean(1)


def expert_share(routing: Sequence[Routing], touched: Tensor, experts: Sequence[int]) -> Tensor:
    """The share of changed patches, over all layers, that the wanted expert processes, for each image: (B,)."""
    taken = [layer.selected[:, e][..., touched] for layer, e in zip(routing, experts, strict=True)]
    return torch.cat(taken, 1).float().mean(1)


def least_used(routing: Sequence[Routing]) -> list[int]:
    """The expert of each layer that the fewest patches are sent to; the first of several."""
    return [int(layer.selected.float().mean((0, 2)).argmin()) for layer in routing]


def _log(gates: Tensor) -> Tensor:
    gates = gates.float()
    return gates.clamp(min=torch.finfo(gates.dtype).tiny).log()
