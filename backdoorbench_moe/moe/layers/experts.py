"""The experts of one layer, with stacked weights so that all experts can be computed at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from backdoorbench_moe.moe.layers.tap import Tap
from backdoorbench_moe.moe.structure import ChannelGroup

# Standard deviation of the initial weights, as for the linear layers of vision transformers in timm.
INIT_STD = 0.02


class StackedLinear(nn.Module):
    """E linear layers of the same shape, with their weights stacked along the first dimension.

    As in a single linear layer, `weight` has one row per output and `bias` has one dimension. An optimizer that decays
    weights but not biases therefore treats stacked and single layers alike.

    Args:
        linear: The layer that every expert is initialised as a copy of.
        count: Number of experts E.

    Attributes:
        weight: (E * out, in) parameter, the rows of expert 0 first.
        bias: (E * out,) parameter; None if the layer has no bias.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(linear.weight.detach().repeat(count, 1))
        own: Tensor | None = linear.bias
        self.register_parameter("bias", None if own is None else nn.Parameter(own.detach().repeat(count)))

    def draw(self) -> None:
        """Draw new weights for every expert, and set the biases to zero."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weights(self) -> Tensor:
        """(E, out, in) view of `weight`."""
        return self.weight.unflatten(0, (self.count, -1))

    @property
    def biases(self) -> Tensor:
        """(E, out) view of `bias`, which must not be None."""
        assert self.bias is not None
        return self.bias.unflatten(0, (self.count, -1))


class Experts(nn.Module, ABC):
    """Base class of the experts of one layer: E networks of the same shape, from D features to D features.

    Subclasses implement three methods of computation, among which `dispatch` chooses. They give the same result up to
    rounding. Weights are stored with the rows of expert 0 first, so that every tensor in the state dict can be split
    along its first dimension into E equal parts.

    Args:
        num_experts: Number of experts E.

    Attributes:
        heard: (E,) buffer, the factor of each expert's output: 1, or 0 for a muted expert.
        hidden: Tap that passes the hidden units before the activation, (rows, E * hidden units), for every token that
            was sent to an expert, including those beyond its capacity. Rows are padded with zeros for experts with
            fewer tokens. Hooks must not change the output.
    """

    heard: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.hidden = Tap()
        self.register_buffer("heard", torch.ones(num_experts))

    def __len__(self) -> int:
        return len(self.heard)

    @property
    @abstractmethod
    def hidden_features(self) -> int:
        """Number of hidden units of one expert."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Compute all experts on equally many tokens each: (E, n, D) to (E, n, D)."""

    @abstractmethod
    def forward_each(self, groups: Sequence[Tensor]) -> Tensor:
        """Compute one expert after the other.

        Args:
            groups: The tokens of each expert, (n_e, D).

        Returns:
            (T, D) outputs, those of expert 0 first. T is the sum of all n_e.
        """

    @abstractmethod
    def forward_grouped(self, tokens: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Compute all experts in grouped matrix products, without reading anything back from the device.

        Args:
            tokens: (T, D), those of expert 0 first.
            ends: (E,) int32, one past the index of the last token of each expert.
            experts: (T,) int64, the expert of each token.

        Returns:
            (T, D) outputs.
        """

    @abstractmethod
    def channel_groups(self) -> list[ChannelGroup]:
        """Return the hidden units of each expert as channels that can be pruned, one group for each expert."""


class MLPExperts(Experts):
    """Experts that are MLPs of two linear layers with an activation between them.

    Args:
        fc1: First linear layer of the MLP that the experts are modelled on, (hidden units, D), with a bias.
        act: Activation without parameters, shared by all experts.
        fc2: Second linear layer, (D, hidden units), with a bias.
        num_experts: Number of experts E.
        copies: Whether all experts are initialised with the weights of this MLP. Otherwise, the weights of each are
            drawn from a truncated normal distribution of standard deviation 0.02, and biases are 0.
        drop1: Dropout after the activation, or None.
        drop2: Dropout after the second linear layer, or None.
    """

    def __init__(
        self,
        fc1: nn.Linear,
        act: nn.Module,
        fc2: nn.Linear,
        *,
        num_experts: int,
        copies: bool,
        drop1: nn.Module | None = None,
        drop2: nn.Module | None = None,
    ) -> None:
        super().__init__(num_experts)
        self.fc1, self.fc2 = StackedLinear(fc1, num_experts), StackedLinear(fc2, num_experts)
        self.act = act
        self.drop1 = nn.Identity() if drop1 is None else drop1
        self.drop2 = nn.Identity() if drop2 is None else drop2
        if not copies:
            self.fc1.draw()
            self.fc2.draw()

    @classmethod
    def like(cls, mlp: nn.Module, *, num_experts: int, copies: bool) -> MLPExperts:
        """Build experts that are modelled on an MLP with the submodules of `timm.layers.Mlp`.

        Args:
            mlp: The MLP, with `fc1`, `act` and `fc2`, and optionally `drop1` and `drop2`.
            num_experts: Number of experts E.
            copies: Whether all experts are initialised with the weights of the MLP.
        """
        fc1, act, fc2 = (mlp.get_submodule(name) for name in ("fc1", "act", "fc2"))
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        drops = {name: getattr(mlp, name, None) for name in ("drop1", "drop2")}
        return cls(fc1, act, fc2, num_experts=num_experts, copies=copies, **drops)

    @property
    def hidden_features(self) -> int:
        """Number of hidden units of one expert."""
        return len(self.fc1.weight) // len(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute all experts on equally many tokens each: (E, n, D) to (E, n, D)."""
        hidden = multiply_batched(self.fc1, tokens)
        if self.hidden.watched:
            self.hidden(hidden.transpose(0, 1).flatten(1))
        return self.drop2(multiply_batched(self.fc2, self._activate(hidden)))

    def forward_each(self, groups: Sequence[Tensor]) -> Tensor:
        """Compute one expert after the other, see `Experts.forward_each`."""
        # Unbound once, since the backward pass of E separate indexing operations would allocate E stacks of zeros.
        first, second = (zip(fc.weights, fc.biases, strict=True) for fc in (self.fc1, self.fc2))
        hidden = [F.linear(tokens, *fc) for tokens, fc in zip(groups, first, strict=True)]
        if self.hidden.watched:
            self.hidden(pad_sequence(hidden).flatten(1))
        outputs = [F.linear(self._activate(values), *fc) for values, fc in zip(hidden, second, strict=True)]
        return self.drop2(torch.cat(outputs))

    def forward_grouped(self, tokens: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Compute all experts in two grouped matrix products, see `Experts.forward_grouped`."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        weight1, weight2 = (fc.weights.to(dtype).transpose(1, 2) for fc in (self.fc1, self.fc2))
        # Gathered before rounding: in half precision, the gradient of a bias would stop growing when it is summed over
        # many tokens.
        bias1, bias2 = (fc.biases[experts].to(dtype) for fc in (self.fc1, self.fc2))
        hidden = F.grouped_mm(tokens.to(dtype), weight1, offs=ends) + bias1
        return self.drop2(F.grouped_mm(self._activate(hidden), weight2, offs=ends) + bias2)

    def channel_groups(self) -> list[ChannelGroup]:
        """Return the hidden units of each expert as channels that can be pruned, one group for each expert."""
        width = self.hidden_features
        return [
            ChannelGroup(f"expert {e}", self.fc1, e * width, (e + 1) * width, tap=self.hidden)
            for e in range(len(self))
        ]

    def _activate(self, values: Tensor) -> Tensor:
        return self.drop1(self.act(values))


def multiply_batched(fc: StackedLinear, values: Tensor) -> Tensor:
    """Apply each of E linear layers to n values: (E, n, in) to (E, n, out)."""
    if fc.bias is None:
        return torch.bmm(values, fc.weights.transpose(1, 2))
    return torch.baddbmm(fc.biases.unsqueeze(1), values, fc.weights.transpose(1, 2))
