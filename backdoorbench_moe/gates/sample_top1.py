"""The gate that draws one expert for each token."""

from __future__ import annotations

from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.checks import check_not_negative
from backdoorbench_moe.moe.layers import Router, SampleTop1Router
from backdoorbench_moe.ops.ranges import check_interval


class SampleTop1(Gate):
    """Draw one expert for each token by adding Gumbel noise to the logits.

    In training, the weight of the expert is its Gumbel-softmax probability, at a temperature that falls from 1 to
    `min_temperature`. Experts are drawn in evaluation as well, with a weight of 1, so that predictions depend on the
    seed. See `moe.layers.SampleTop1Router` for the differences from the source.

    Args:
        balance: Weight of the balance loss, at least 0; 0 for none. The loss is averaged over the layers of the model.
        init_std: Standard deviation of the initial weights, at least 0; 0 in the source.
        min_temperature: Smallest temperature, in (0, 1].
        decay: Rate of the decay, at least 0: the temperature is exp(-decay * step), but at least `min_temperature`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Kim et al., "MoEvil", ACSAC 2025, §6.2, and its code for the temperature. The paper does not state whether
        this gate has a balance loss.
    """

    def __init__(
        self,
        *,
        balance: float = 0.01,
        init_std: float = 1e-3,
        min_temperature: float = 0.5,
        decay: float = 0.01,
    ) -> None:
        super().__init__()
        check_not_negative("sample-top1", balance=balance, init_std=init_std, decay=decay)
        check_interval("sample-top1: min_temperature", min_temperature, "(0, 1]")
        self.balance, self.init_std = balance, init_std
        self.min_temperature, self.decay = min_temperature, decay

    def build(self, features: int, num_experts: int) -> Router:
        """Build the router of one layer."""
        return SampleTop1Router(
            features,
            num_experts,
            balance=self.balance,
            gate_std=self.init_std,
            min_temperature=self.min_temperature,
            decay=self.decay,
        )
