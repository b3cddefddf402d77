"""Sparse routers, which decide which experts each token is sent to and the weights of their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.layers.assignment import (
    Assignment,
    assign_chosen,
    expert_capacity,
    top_experts,
    within_capacity,
)
from backdoorbench_moe.moe.layers.losses import importance_loss, load_loss
from backdoorbench_moe.moe.precision import full_precision


@dataclass(frozen=True)
class RouterOutput:
    """The decision of a router for a batch of B sequences of N tokens.

    Attributes:
        gates: (B, N, E) float32, the router's weights before selection.
        selected: (B, N, E) bool, the experts that process each token.
        assignment: The same decision as a list of pairs, with the weight of each expert's output. The weights may
            differ from the gates: for example, a router may renormalise the gates of the selected experts.
        aux_loss: Scalar that is added to the loss in training, or None.
    """

    gates: Tensor
    selected: Tensor
    assignment: Assignment
    aux_loss: Tensor | None = None


class Router(nn.Module, ABC):
    """Base class of sparse routers.

    Subclasses implement `forward`. `SparseMoELayer` accepts any router, since dispatching and experts depend only on
    the assignment that the router returns.

    Args:
        num_experts: Number of experts E.

    Attributes:
        masked: (E,) bool buffer. Experts marked here receive no tokens. Subclasses must respect it.
        layers: Number of routed layers of the model, which a `Gate` sets; otherwise 1. The auxiliary losses of all
            layers are summed. A router whose loss should be averaged over the layers divides it by this number.
    """

    masked: Tensor
    layers: int = 1

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("masked", torch.zeros(num_experts, dtype=torch.bool))

    @abstractmethod
    def forward(self, tokens: Tensor) -> RouterOutput:
        """Route tokens (B, N, D) to experts."""


class LinearRouter(Router):
    """Base class of routers whose logits are a linear function of the token, without bias.

    Logits are computed in fp32 even under autocast, and those of masked experts are set to the smallest finite number.
    Subclasses implement `choose`, which decides based on the logits.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        gate_std: Standard deviation of the initial weights.

    Attributes:
        weight: (E, D) parameter.
    """

    def __init__(self, features: int, num_experts: int, *, gate_std: float) -> None:
        super().__init__(num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, features))
        nn.init.normal_(self.weight, std=gate_std)

    def forward(self, tokens: Tensor) -> RouterOutput:
        """Route tokens (B, N, D) to experts."""
        with full_precision(tokens.device):
            logits = nn.functional.linear(tokens.float(), self.weight.float())
            # Not minus infinity: a softmax over experts that are all masked must stay finite.
            logits = logits.masked_fill(self.masked, torch.finfo(logits.dtype).min)
            return self.choose(logits)

    @abstractmethod
    def choose(self, logits: Tensor) -> RouterOutput:
        """Decide from logits (B, N, E) float32, in a context without autocast."""


class TopKRouter(LinearRouter):
    """Each token goes to the `top_k` experts with the largest gates, which are a softmax over all experts.

    The gates of the selected experts are not renormalised. In training, normal noise of standard deviation
    `noise` / E is added to the logits, the auxiliary loss is `importance` times the importance loss plus `load` times
    the load loss, and each expert takes at most ceil(top_k * S * capacity / E) of the S tokens in the batch, by batch
    priority (see `within_capacity`). In evaluation there is neither noise nor loss, and `eval_capacity` applies.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        top_k: Experts for each token, 1 to E.
        gate_std: Standard deviation of the initial weights.
        noise: Standard deviation of the noise times E; 0 for no noise.
        importance: Weight of the importance loss.
        load: Weight of the load loss. It has no effect without noise or if `top_k` is E.
        capacity: Capacity in training as a multiple of an even load; None for no limit.
        eval_capacity: The same in evaluation. With a limit, an image's output depends on the others in its batch.

    Source:
        Riquelme et al., NeurIPS 2021, §2, §4 and appendix A.
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
        super().__init__(features, num_experts, gate_std=gate_std)
        self.top_k = top_k
        self.noise, self.importance, self.load = noise, importance, load
        self.capacity, self.eval_capacity = capacity, eval_capacity

    def choose(self, logits: Tensor) -> RouterOutput:
        """Add noise, take the largest gates, apply the capacity and compute the auxiliary loss."""
        images, tokens, experts = logits.shape
        clean = logits.flatten(0, 1)
        deviation = self.noise / experts
        noisy = clean + deviation * torch.randn_like(clean) if self.training and self.noise else clean
        gates = noisy.softmax(-1)
        chosen = top_experts(gates, self.top_k)
        capacity = self._capacity(images * tokens, experts)
        kept = within_capacity(gates, chosen, capacity) & ~self.masked[chosen]
        selected = torch.zeros_like(gates, dtype=torch.bool).scatter(1, chosen, kept)
        return RouterOutput(
            gates.unflatten(0, (images, tokens)),
            selected.unflatten(0, (images, tokens)),
            assign_chosen(gates, chosen, kept, capacity),
            self._aux_loss(clean, noisy, deviation) if self.training else None,
        )

    def _capacity(self, tokens: int, experts: int) -> int:
        factor = self.capacity if self.training else self.eval_capacity
        if factor is None:
            return tokens
        return min(tokens, expert_capacity(tokens, experts, self.top_k, factor))

    def _aux_loss(self, clean: Tensor, noisy: Tensor, deviation: float) -> Tensor:
        loss = self.importance * importance_loss(clean.softmax(-1))
        if self.noise and self.top_k < clean.shape[1]:
            loss = loss + self.load * load_loss(clean, noisy, deviation, self.top_k)
        return loss


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the ceil(top_k * N / E) tokens of each image whose gates for it are largest.

    A token has `top_k` experts on average and may have none. Every expert has the same load, so that no noise, loss or
    capacity is needed. Experts choose within each image, as in pMoE; in the source they choose within the batch, so
    that an image's output depends on the others in its batch.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        top_k: Average number of experts for each token, 1 to E.
        gate_std: Standard deviation of the initial weights.

    Source:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022, §3.
    """

    def __init__(self, features: int, num_experts: int, *, top_k: int, gate_std: float) -> None:
        super().__init__(features, num_experts, gate_std=gate_std)
        self.top_k = top_k

    def choose(self, logits: Tensor) -> RouterOutput:
        """Choose the tokens of each expert."""
        images, tokens, experts = logits.shape
        gates = logits.softmax(-1)
        room = min(tokens, expert_capacity(tokens, experts, self.top_k, 1.0))
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
        return RouterOutput(gates, selected, assignment)
