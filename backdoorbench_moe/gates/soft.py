"""The gate that sends each token to all experts."""

from __future__ import annotations

from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.checks import check_not_negative
from backdoorbench_moe.moe.layers import Router, TopKSoftmaxRouter


class Soft(Gate):
    """Send each token to all experts, weighted by the softmax over all logits.

    Args:
        balance: Weight of the balance loss, at least 0; 0 for none. The loss is averaged over the layers of the model.
        init_std: Standard deviation of the initial weights, at least 0; 0 in the source (see the gate `top-k`).

    Raises:
        ConfigError: A value is out of range.

    Source:
        Kim et al., "MoEvil", ACSAC 2025, §6.2. It does not state whether this gate has a balance loss.
    """

    def __init__(self, *, balance: float = 0.01, init_std: float = 1e-3) -> None:
        super().__init__()
        check_not_negative("soft", balance=balance, init_std=init_std)
        self.balance, self.init_std = balance, init_std

    def build(self, features: int, num_experts: int) -> Router:
        """Build the router of one layer."""
        return TopKSoftmaxRouter(
            features, num_experts, top_k=num_experts, balance=self.balance, gate_std=self.init_std
        )
