"""Assignment of tokens to experts: choice of experts, capacity, and the list of (token, expert) pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """T pairs of a token and an expert, sorted by expert. The S tokens of the batch are numbered from 0.

    T must depend only on the shapes of tensors, not on their values, so that a training step can be captured as a CUDA
    graph. Pairs that exceed an expert's capacity are therefore kept, with a weight of 0.

    Attributes:
        tokens: (T,) int64, the token of each pair.
        experts: (T,) int64, the expert of each pair, ascending.
        counts: (E,) int64, the number of pairs of each expert.
        weights: (T,) float32, the factor of the expert's output for the token; 0 for pairs that exceed the expert's
            capacity, which are the last pairs of the expert.
        capacity: Upper bound of the number of pairs of one expert with a nonzero weight.
    """

    tokens: Tensor
    experts: Tensor
    counts: Tensor
    weights: Tensor
    capacity: int


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Return ceil(top_k * tokens * factor / experts), the largest number of tokens that one expert processes.

    Args:
        tokens: Number of tokens.
        experts: Number of experts.
        top_k: Number of experts that each token selects.
        factor: Capacity as a multiple of an even load.
    """
    share = top_k * tokens * factor / experts
    # Rounding first removes floating-point errors: 1.05 * 100 is slightly above 105, and its ceiling would be 106. A
    # small share must not be rounded to 0, since its ceiling is 1.
    return math.ceil(round(share, 6) or share)


def top_experts(gates: Tensor, top_k: int) -> Tensor:
    """Return the experts with the largest gates for each token.

    Args:
        gates: (S, E).
        top_k: Number K of experts for each token, 1 to E.

    Returns:
        (S, K) int64 indices of experts, by descending gate. Among equal gates, the lower index comes first.
    """
    return gates.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def within_capacity(gates: Tensor, chosen: Tensor, capacity: int) -> Tensor:
    """Decide which tokens the chosen experts process, given their capacity, by Batch Prioritized Routing.

    The first choices of all tokens are assigned before all second choices, and so on. Choices of the same rank are
    assigned in descending order of the largest gate of each token; for equal gates, in ascending order of the tokens.
    A choice is dropped if its expert is full.

    Args:
        gates: (S, E).
        chosen: (S, K) int64 indices of experts, first choice first.
        capacity: Largest number of tokens that one expert processes.

    Returns:
        (S, K) bool, True where the expert processes the token.

    Source:
        Riquelme et al., "Scaling Vision with Sparse Mixture of Experts" (V-MoE), NeurIPS 2021, section 4.1.
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
        gates: (S, E), the factors of the experts' outputs.
        chosen: (S, K) int64 indices of experts.
        kept: (S, K) bool, False for pairs that get the weight 0.
        capacity: Upper bound of the number of kept pairs of one expert.

    Returns:
        An assignment of T = S * K pairs.
    """
    experts, owners = gates.shape[1], chosen.flatten()
    order = (2 * owners + ~kept.flatten()).sort(stable=True).indices
    weights = (gates.gather(1, chosen) * kept).flatten()[order]
    counts = _one_hot(owners, experts).sum(0)
    return Assignment(order // chosen.shape[1], owners[order], counts, weights, capacity)


def _one_hot(numbers: Tensor, experts: int) -> Tensor:
    """Encode (T,) indices of experts as (T, E) bool, without the device synchronisation of `bincount` and `one_hot`."""
    return numbers.unsqueeze(1) == torch.arange(experts, device=numbers.device)
