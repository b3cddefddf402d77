"""Experts that are gated MLPs, as in Llama."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from backdoorbench_moe.moe.layers.experts import Experts, StackedLinear, multiply_batched
from backdoorbench_moe.moe.structure import ChannelGroup


class GatedMLPExperts(Experts):
    """Experts that are gated MLPs: down_proj(act(gate_proj(x)) * up_proj(x)), without biases.

    With the activation SiLU, they are the SwiGLU MLPs of Llama and Mixtral. The tap `hidden` passes the outputs of
    `gate_proj`. A hidden unit whose row of `gate_proj` is zero has no effect, since the activation of 0 is 0.

    Args:
        gate_proj: The linear layer before the activation, (hidden units, D).
        up_proj: The linear layer whose outputs are multiplied by the activations, (hidden units, D).
        down_proj: The last linear layer, (D, hidden units).
        act: Activation without parameters, shared by all experts, which must be 0 at 0.
        num_experts: Number of experts E.
        copies: Whether all experts are initialised with the weights of this MLP. Otherwise, the weights of each are
            drawn from a truncated normal distribution of standard deviation 0.02.

    Source:
        Shazeer, "GLU variants improve transformer", arXiv 2002.05202, §2.
    """

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        act: nn.Module,
        *,
        num_experts: int,
        copies: bool,
    ) -> None:
        super().__init__(num_experts)
        self.gate_proj = StackedLinear(gate_proj, num_experts)
        self.up_proj = StackedLinear(up_proj, num_experts)
        self.down_proj = StackedLinear(down_proj, num_experts)
        self.act = act
        if not copies:
            for stacked in (self.gate_proj, self.up_proj, self.down_proj):
                stacked.draw()

    @classmethod
    def like(cls, mlp: nn.Module, *, num_experts: int, copies: bool) -> GatedMLPExperts:
        """Build experts that are modelled on an MLP with the submodules of a Llama MLP of transformers.

        Args:
            mlp: The MLP, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
            num_experts: Number of experts E.
            copies: Whether all experts are initialised with the weights of the MLP.
        """
        gate, up, down = (mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        return cls(gate, up, down, mlp.get_submodule("act_fn"), num_experts=num_experts, copies=copies)

    @property
    def hidden_features(self) -> int:
        """Number of hidden units of one expert."""
        return len(self.gate_proj.weight) // len(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute all experts on equally many tokens each: (E, n, D) to (E, n, D)."""
        gates = multiply_batched(self.gate_proj, tokens)
        if self.hidden.watched:
            self.hidden(gates.transpose(0, 1).flatten(1))
        return multiply_batched(self.down_proj, self.act(gates) * multiply_batched(self.up_proj, tokens))

    def forward_each(self, groups: Sequence[Tensor]) -> Tensor:
        """Compute one expert after the other, see `Experts.forward_each`."""
        # Unbound once, see `MLPExperts.forward_each`.
        weights = [fc.weights.unbind() for fc in (self.gate_proj, self.up_proj, self.down_proj)]
        gates = [F.linear(tokens, gate) for tokens, gate in zip(groups, weights[0], strict=True)]
        if self.hidden.watched:
            self.hidden(pad_sequence(gates).flatten(1))
        return torch.cat(
            [
                F.linear(self.act(gate) * F.linear(tokens, up), down)
                for tokens, gate, up, down in zip(groups, gates, *weights[1:], strict=True)
            ]
        )

    def forward_grouped(self, tokens: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Compute all experts in three grouped matrix products, see `Experts.forward_grouped`."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        tokens = tokens.to(dtype)
        gate, up, down = (
            fc.weights.to(dtype).transpose(1, 2) for fc in (self.gate_proj, self.up_proj, self.down_proj)
        )
        hidden = self.act(F.grouped_mm(tokens, gate, offs=ends)) * F.grouped_mm(tokens, up, offs=ends)
        return F.grouped_mm(hidden, down, offs=ends)

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the hidden units of each expert as channels that can be pruned, one group for each expert."""
        width = self.hidden_features
        return [
            ChannelGroup(f"expert {e}", self.gate_proj, e * width, (e + 1) * width, tap=self.hidden)
            for e in range(len(self))
        ]
