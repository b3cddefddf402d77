"""Routers: which token goes to which expert, and how much its answer counts."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bbmoe_vmoe.losses import importance_loss, load_loss
from bbmoe_vmoe.precision import full_precision


@dataclass(frozen=True)
class Assignment:
    """T pairs of a token and an expert, those of expert 0 first; S tokens, numbered through the batch.

    tokens: (T,) int64, each pair's token. owners: (T,) int64, its expert. counts: (E,) int64, pairs of each expert.
    weights: (T,) float32, what the expert's answer is multiplied by; 0 for a pair the capacity leaves no room
    for. In an expert's group these come last. capacity: no more than so many pairs of an expert have room. T
    hangs on shapes alone.
    """

    tokens: Tensor
    owners: Tensor
    counts: Tensor
    weights: Tensor
    capacity: int


@dataclass(frozen=True)
class Choice:
    """What a router says of a batch of B images of N tokens.

    gates: (B, N, E) float32, weights before selection. selected: (B, N, E) bool, what has room. loss: scalar
    that keeps the experts evenly loaded, in training; or None.
    """

    gates: Tensor
    selected: Tensor
    assignment: Assignment
    loss: Tensor | None


class Router(nn.Module):
    """A linear layer without bias and a softmax over the experts, in fp32 always, also under autocast.

    gate_std: standard deviation its weights are drawn with. `masked` (E,) marks experts that get no token any more.
    """

    masked: Tensor

    def __init__(self, features: int, num_experts: int, *, top_k: int, gate_std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, features))
        nn.init.normal_(self.weight, std=gate_std)
        self.register_buffer("masked", torch.zeros(num_experts, dtype=torch.bool))

    def forward(self, tokens: Tensor) -> Choice:
        """Tokens (B, N, D) to gates, selection and assignment."""
        with full_precision(tokens.device):
            logits = nn.functional.linear(tokens.float(), self.weight.float())
            # Not minus infinity: a softmax over experts that are all masked must stay finite.
            logits = logits.masked_fill(self.masked, torch.finfo(logits.dtype).min)
            return self.choose(logits)

    @abstractmethod
    def choose(self, logits: Tensor) -> Choice:
        """From the logits (B, N, E) on."""


class TopKRouter(Router):
    """Every token takes its `top_k` experts of largest gate; gates are not renormalised.

    In training: normal noise of standard deviation `noise` / E on the logits, `importance` and `load` times the
    losses of that name, and room for ceil(top_k * S * capacity / E) tokens at each expert, S over the batch. In
    evaluation: no noise, no losses, and `eval_capacity`. None is room for all (dropless). Room is given by batch
    priority: all tokens' first choices before all second ones, and among these by the tokens' largest gate.

    Source: Riquelme et al., NeurIPS 2021, §2, §4 and appendix A.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        top_k: int,
        gate_std: float,
        noise: float = 1.0,
        importance: float = 0.005,
        load: float = 0.005,
        capacity: float | None = 1.05,
        eval_capacity: float | None = None,
    ) -> None:
        super().__init__(features, num_experts, top_k=top_k, gate_std=gate_std)
        self.noise, self.importance, self.load = noise, importance, load
        self.capacity, self.eval_capacity = capacity, eval_capacity

    def choose(self, logits: Tensor) -> Choice:
        """Noise, top-K, room, losses."""
        images, tokens, experts = logits.shape
        clean = logits.flatten(0, 1)
        deviation = self.noise / experts
        noisy = clean + deviation * torch.randn_like(clean) if self.training and self.noise else clean
        gates = noisy.softmax(-1)
        chosen = best_experts(gates, self.top_k)
        factor = self.capacity if self.training else self.eval_capacity
        room = images * tokens
        if factor is not None:
            room = min(room, capacity_of(room, experts, self.top_k, factor))
        kept = within_capacity(gates, chosen, room) & ~self.masked[chosen]
        selected = torch.zeros_like(gates, dtype=torch.bool).scatter(1, chosen, kept)
        loss = None
        if self.training:
            loss = self.importance * importance_loss(clean.softmax(-1))
            if self.noise and self.top_k < experts:
                loss = loss + self.load * load_loss(clean, noisy, deviation, self.top_k)
        return Choice(
            gates.unflatten(0, (images, tokens)),
            selected.unflatten(0, (images, tokens)),
            assign_chosen(gates, chosen, kept, room),
            loss,
        )


class ExpertChoiceRouter(Router):
    """Every expert takes, of every image, the ceil(top_k * N / E) tokens whose gates for it are largest.

    So a token has `top_k` experts on average, and every expert is full: no noise, losses or capacity. Chosen within
    each image, as in pMoE; over the batch, as in the source, an image's answer would hang on its neighbours.
    Source: Zhou et al., NeurIPS 2022, §3.
    """

    def choose(self, logits: Tensor) -> Choice:
        """Each expert its tokens."""
        images, tokens, experts = logits.shape
        gates = logits.softmax(-1)
        room = min(tokens, capacity_of(tokens, experts, self.top_k, 1.0))
        best = gates.detach().sort(dim=1, descending=True, stable=True).indices[:, :room]
        kept = (~self.masked).expand(best.shape)
        selected = torch.zeros_like(gates, dtype=torch.bool).scatter(1, best, kept)
        weights = gates.gather(1, best) * kept
        first = torch.arange(images, device=logits.device).view(-1, 1, 1) * tokens
        counts = torch.full((experts,), images * room, device=logits.device)
        owners = torch.arange(experts, device=logits.device).repeat_interleave(images * room)
        assignment = Assignment(
            (best + first).permute(2, 0, 1).flatten(),
            owners,
            counts,
            weights.permute(2, 0, 1).flatten(),
            images * room,
        )
        return Choice(gates, selected, assignment, None)


def capacity_of(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """ceil(top_k * tokens * factor / experts): how many tokens an expert has room for."""
    # As the factor is written: 1.05 * 100 is a little over 105 in binary.
    return math.ceil(round(top_k * tokens * factor / experts, 6))


def best_experts(gates: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest of gates (S, E), largest first, as (S, K) int64; of equals, the first ones."""
    return gates.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def within_capacity(gates: Tensor, chosen: Tensor, capacity: int) -> Tensor:
    """Which of the chosen experts (S, K) have room for their token: (S, K) bool, by batch priority.

    All first choices are served before all second ones, and so on; tokens with a larger largest gate (S, E)
    are served first; of equals, the first.
    """
    order = gates.detach().amax(-1).sort(descending=True, stable=True).indices
    queue = chosen[order].t().flatten()
    taken = _marked(queue, gates.shape[1]).cumsum(0)
    has_room = taken.gather(1, queue.unsqueeze(1)).squeeze(1) <= capacity
    served = has_room.unflatten(0, (chosen.shape[1], -1)).t()
    return torch.empty_like(served).index_copy_(0, order, served)


def assign_chosen(gates: Tensor, chosen: Tensor, kept: Tensor, capacity: int) -> Assignment:
    """Pairs of each of S tokens and its K chosen experts (S, K), weighted by the gates (S, E) where kept (S, K)."""
    experts, owners = gates.shape[1], chosen.flatten()
    order = (2 * owners + ~kept.flatten()).sort(stable=True).indices
    weights = (gates.gather(1, chosen) * kept).flatten()[order]
    counts = _marked(owners, experts).sum(0)
    return Assignment(order // chosen.shape[1], owners[order], counts, weights, capacity)


def _marked(owners: Tensor, experts: int) -> Tensor:
    """(T,) numbers of experts as (T, E) bool; unlike counting and `one_hot`, it never waits for the device."""
    return owners.unsqueeze(1) == torch.arange(experts, device=owners.device)
