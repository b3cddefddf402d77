"""Routers for merged experts, which were trained separately; only the router is trained after merging.

Source: Kim et al., "MoEvil: Poisoning Experts to Compromise the Safety of Mixture-of-Experts LLMs", ACSAC 2025,
    eq. 1 and §6.2, and its code (jaehanwork/MoEvil).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers.assignment import assign_chosen, top_experts
from backdoorbench_moe.moe.layers.losses import balance_loss
from backdoorbench_moe.moe.layers.padding import ignored_positions
from backdoorbench_moe.moe.layers.routers import LinearRouter, RouterOutput


class MergedRouter(LinearRouter):
    """Base class of linear routers that choose K experts for each token, without a capacity.

    `RouterOutput.gates` is the softmax over all experts. In training, the auxiliary loss is `balance` times
    `balance_loss`, divided by the number of routed layers (see `Router.layers`), since the source averages it over the
    layers. Padding is not counted (see `padding.ignored`). Subclasses implement `select`.

    The source initialises the weights with zeros, so that all logits are equal and the experts with the lowest indices
    are chosen for every token. Here the initial weights are small random numbers; a `gate_std` of 0 gives the
    initialisation of the source.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        balance: Weight of the balance loss; 0 for none.
        gate_std: Standard deviation of the initial weights, which are normally distributed.
    """

    def __init__(
        self, features: int, num_experts: int, *, balance: float = 0.01, gate_std: float = 1e-3
    ) -> None:
        super().__init__(features, num_experts, gate_std=gate_std)
        self.balance = balance

    @abstractmethod
    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: (S, E) float32. Those of masked experts are the smallest finite number.

        Returns:
            The chosen experts, (S, K) int64, and the weights of their outputs, (S, K) float32. The weights of masked
            experts must be finite; the caller sets them to 0.
        """

    def choose(self, logits: Tensor) -> RouterOutput:
        """Choose experts for each token, and compute the balance loss."""
        flat = logits.flatten(0, 1)
        gates = flat.softmax(-1)
        chosen, factors = self.select(flat)
        kept = ~self.masked[chosen]
        weights = torch.zeros_like(flat).scatter(1, chosen, factors * kept)
        selected = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, kept)
        return RouterOutput(
            gates.view_as(logits),
            selected.view_as(logits),
            assign_chosen(weights, chosen, kept, len(flat)),
            self._aux_loss(weights, gates),
        )

    def _aux_loss(self, weights: Tensor, gates: Tensor) -> Tensor | None:
        if not (self.training and self.balance):
            return None
        padding = ignored_positions()
        counted = None if padding is None else ~padding.flatten()
        return self.balance / self.layers * balance_loss(weights, gates, counted)


class TopKSoftmaxRouter(MergedRouter):
    """Each token goes to the `top_k` experts with the largest logits, weighted by the softmax over these logits.

    The weights of a token sum to 1. With `top_k` = E, every token goes to all experts. With `top_k` = 1, the weight is
    always 1, so that only the balance loss has a gradient.

    In training, noise from torch's global generator is added to the logits when experts are chosen, so that all experts
    are tried while the logits are small. The weights of the chosen experts are computed without noise.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        top_k: Experts for each token, 1 to E.
        balance: Weight of the balance loss; 0 for none.
        gate_std: Standard deviation of the initial weights.
        noise: Standard deviation of the noise, which is normally distributed; 0 for none.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        top_k: int,
        balance: float = 0.01,
        gate_std: float = 1e-3,
        noise: float = 0.0,
    ) -> None:
        super().__init__(features, num_experts, balance=balance, gate_std=gate_std)
        self.top_k, self.noise = top_k, noise

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the largest logits (S, E)."""
        # The logits of masked experts are the smallest finite number, which noise does not change.
        explores = self.training and self.noise
        seen = logits + self.noise * torch.randn_like(logits) if explores else logits
        chosen = top_experts(seen, self.top_k)
        return chosen, logits.gather(1, chosen).softmax(-1)


class SampleTop1Router(MergedRouter):
    """Each token goes to one expert, drawn by adding Gumbel noise to the logits.

    In training, the expert with the largest Gumbel-softmax probability is chosen, and the weight of its output is this
    probability, without renormalisation. The temperature is max(`min_temperature`, exp(-`decay` * step)), where step is
    the number of earlier forward passes in training mode; the source counts steps of the optimizer.

    In evaluation, an expert is drawn in the same way, and its weight is 1. The source draws it at the smallest
    temperature, which makes no difference, since the temperature does not change the order of the noisy logits. In both
    modes, the probability that an expert is drawn is its gate.

    Noise is drawn from torch's global generator, also in evaluation. For the first layer in evaluation, the source's
    code uses the softmax over all experts instead, which its paper does not mention. This is not reproduced.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        balance: Weight of the balance loss; 0 for none.
        gate_std: Standard deviation of the initial weights.
        min_temperature: Smallest temperature, in (0, 1].
        decay: Rate at which the temperature falls, at least 0.

    Attributes:
        step: Scalar float32 buffer, increased on the device, so that a captured CUDA graph increases it as well. It is
            a floating-point number like the weights, so that code that resets the weights also restarts the
            schedule.
    """

    step: Tensor

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        balance: float = 0.01,
        gate_std: float = 1e-3,
        min_temperature: float = 0.5,
        decay: float = 0.01,
    ) -> None:
        super().__init__(features, num_experts, balance=balance, gate_std=gate_std)
        self.min_temperature, self.decay = min_temperature, decay
        self.register_buffer("step", torch.zeros((), dtype=torch.float32))

    @property
    def temperature(self) -> Tensor:
        """Temperature of the next forward pass in training mode, a scalar on the device."""
        return (-self.decay * self.step).exp().clamp(min=self.min_temperature)

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw an expert for each token, from logits (S, E)."""
        noisy = logits + gumbel_noise(logits)
        if not self.training:
            chosen = top_experts(noisy, 1)
            return chosen, torch.ones_like(chosen, dtype=logits.dtype)
        # Masked after the division, since the smallest number divided by a temperature below 1 is infinite.
        cooled = (noisy / self.temperature).masked_fill(self.masked, torch.finfo(logits.dtype).min)
        self.step.add_(1)
        chosen = top_experts(cooled, 1)
        return chosen, cooled.softmax(-1).gather(1, chosen)


def gumbel_noise(logits: Tensor) -> Tensor:
    """Draw standard Gumbel noise of the shape of `logits`: minus the logarithm of an exponential variable, never 0."""
    return -torch.empty_like(logits).exponential_().log()
