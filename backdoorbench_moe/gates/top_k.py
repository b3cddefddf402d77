"""The gate that sends each token to the experts with the largest logits."""

from __future__ import annotations

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.gates.base import Gate
from backdoorbench_moe.gates.checks import check_not_negative, check_top_k
from backdoorbench_moe.moe.layers import Router, TopKSoftmaxRouter


class TopK(Gate):
    """Send each token to the `top_k` experts with the largest logits, weighted by the softmax over these logits.

    There are two differences from the source:

    - The router is initialised with small random weights. The source uses zeros, so that at first the experts with the
      lowest indices get every token; `init_std` 0 does the same.
    - In training, noise is added to the logits when experts are chosen, as by Shazeer et al. Without noise, only the
      experts that a token is sent to receive a gradient, so that the gate cannot learn that another expert would be
      better. In the suite `moevil-gates` on `signs`, overall of the benign mixture is 91.5 ± 7.4% without noise and
      95.8 ± 0.9% with it (five seeds). `noise` 0 gives the gate of the source. Shazeer et al. learn the standard
      deviation of the noise and also add it to the weights; here it is constant and only affects the choice.

    Args:
        top_k: Experts for each token, 1 to E. With 1, the weight is always 1, so that only the balance loss trains the
            gate.
        balance: Weight of the balance loss, at least 0; 0 for none. The loss is averaged over the layers of the model.
        init_std: Standard deviation of the initial weights, at least 0.
        noise: Standard deviation of the noise in training, at least 0; 0 for none.

    Raises:
        ConfigError: A value is out of range, or `top_k` is 1 and `balance` is 0, so that nothing would train the gate.

    Source:
        Kim et al., "MoEvil", ACSAC 2025, eq. 1 and §6.2. Noise: Shazeer et al., "Outrageously large neural networks",
        ICLR 2017, §2.1.
    """

    def __init__(
        self, *, top_k: int = 2, balance: float = 0.01, init_std: float = 1e-3, noise: float = 1.0
    ) -> None:
        super().__init__()
        check_top_k("top-k", top_k)
        check_not_negative("top-k", balance=balance, init_std=init_std, noise=noise)
        if top_k == 1 and not balance:
            raise ConfigError.expected(
                "top-k: balance", "a number above 0, as nothing else trains a gate with top_k 1", balance
            )
        self.top_k, self.balance, self.init_std, self.noise = top_k, balance, init_std, noise

    def check(self, num_experts: int) -> None:
        """Raise ConfigError if `top_k` is larger than the number of experts."""
        check_top_k("top-k", self.top_k, num_experts)

    def build(self, features: int, num_experts: int) -> Router:
        """Build the router of one layer."""
        return TopKSoftmaxRouter(
            features,
            num_experts,
            top_k=self.top_k,
            balance=self.balance,
            gate_std=self.init_std,
            noise=self.noise,
        )
