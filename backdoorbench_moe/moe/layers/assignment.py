"""Which token goes to which expert: choosing experts, their capacity, and the list of (token, expert) pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """T pairs of a token and an expert, sorted by expert. Tokens are numbered from 0 to S - 1 through the batch.

    T depends on shapes alone, never on values, so that a training step can be captured as a CUDA graph. Pairs that
    exceed an expert's capacity therefore stay in the list with weight 0.

    Attributes:
        tokens: (T,) int64, the token of each pair.
        experts: (T,) int64, the expert of each pair, ascending.
        counts: (E,) int64, the number of pairs of each expert.
        weights: (T,) float32, the factor of the expert's output. It is 0 for a pair that exceeds the expert's
            capacity; within an expert these pairs come last.
        capacity: The largest number of pairs of one expert whose weight may differ from 0.
    """

    tokens: Tensor
    experts: Tensor
    counts: Tensor
    weights: Tensor
    capacity: int


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Return ceil(top_k * tokens * factor / experts), the number of tokens that an expert takes at most.

    Args:
        tokens: Number of tokens.
        experts: Number of experts.
        top_k: Experts for each token.
        factor: Multiple of an even load.
    """
    share = top_k * tokens * factor / experts
    # The factor is taken as it is written: 1.05 * 100 is slightly above 105 in binary. Room is never rounded to 0.
    return math.ceil(round(share, 6) or share)


def top_experts(gates: Tensor, top_k: int) -> Tensor:
    """Return the experts with the largest gates for each token.

    Args:
        gates: (S, E).
        top_k: Experts for each token, 1 to E.

    Returns:
        (S, K) int64 numbers of experts, largest gate first. Of equal gates, the lower number comes first.
    """
    return gates.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def within_capacity(gates: Tensor, chosen: Tensor, capacity: int) -> Tensor:
    """Decide by batch priority which of the chosen experts have room for their token.

    First choices of all tokens are served before second choices, and so on. Among the choices of the same rank,
    tokens with a larger largest gate are served first; of equal gates, the token with the lower number.

    Args:
        gates: (S, E).
        chosen: (S, K) int64 numbers of experts, first choice first.
        capacity: Tokens that one expert takes.

    Returns:
        (S, K) bool, True where the expert takes the token.

    Source: Riquelme et al., NeurIPS 2021, §4.1.
    """
    order = gates.detach().amax(-1).sort(descending=True, stable=True).indices
    queue = chosen[order].t().flatten()
    taken = _one_hot(queue, gates.shape[1]).cumsum(0)
    has_room = taken.gather(1, queue.unsqueeze(1)).squeeze(1) <= capacity
    served = has_room.unflatten(0, (chosen.shape[1], -1)).t()
    return torch.empty_like(served).index_copy_(0, order, served)


def assign_chosen(gates: Tensor, chosen: Tensor, kept: Tensor, capacity: int) -> Assignment:
    """Pair each token with its chosen experts, weighted by their gates.

    Args:
        gates: (S, E), the weights of the experts' outputs.
        chosen: (S, K) int64 numbers of experts.
        kept: (S, K) bool, False for pairs that get weight 0.
        capacity: At least the number of kept pairs of any expert.

    Returns:
        An assignment of T = S * K pairs.
    """
    experts, owners = gates.shape[1], chosen.flatten()
    order = (2 * owners + ~kept.flatten()).sort(stable=True).indices
    weights = (gates.gather(1, chosen) * kept).flatten()[order]
    counts = _one_hot(owners, experts).sum(0)
    return Assignment(order // chosen.shape[1], owners[order], counts, weights, capacity)


def _one_hot(numbers: Tensor, experts: int) -> Tensor:
    """(T,) numbers of experts to (T, E) bool. Unlike `bincount` and `one_hot`, this never waits for the device."""
    return numbers.unsqueeze(1) == torch.arange(experts, device=numbers.device)
