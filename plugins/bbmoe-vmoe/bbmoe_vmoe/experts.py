"""E MLPs of one shape, their weights stacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bbmoe_vmoe.tap import Tap

# What timm draws the linear layers of a vision transformer with.
INIT_STD = 0.02


class StackedLinear(nn.Module):
    """E linear layers like `linear`, row by row and expert by expert: weight (E * out, in), bias (E * out,).

    So a row is one output, and a bias has one dimension, as in the dense layer: an optimizer that decays
    weights and not biases does the same to both.
    """

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        assert linear.bias is not None
        self.count = count
        self.weight = nn.Parameter(linear.weight.detach().repeat(count, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(count))

    def draw(self) -> None:
        """Give every expert weights of its own."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        nn.init.zeros_(self.bias)

    @property
    def weights(self) -> Tensor:
        """(E, out, in)."""
        return self.weight.unflatten(0, (self.count, -1))

    @property
    def biases(self) -> Tensor:
        """(E, out)."""
        return self.bias.unflatten(0, (self.count, -1))


class Experts(nn.Module):
    """E experts, each linear-activation-linear like `mlp`: D features in and out, H hidden units.

    copies: every expert starts with the weights of `mlp`; otherwise each is drawn by itself, as timm draws a
    transformer's linear layers. `heard` (E,) is what an expert's output is multiplied by: 1, or 0 for an expert
    that is muted. `hidden` is a tap, to be read only, that gives what goes into the activation, (rows, E * H), for
    every token sent to an expert, with room there or without; zeros where an expert has fewer tokens than another.
    """

    heard: Tensor

    def __init__(self, mlp: Mlp, num_experts: int, *, copies: bool) -> None:
        super().__init__()
        assert isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear)
        self.fc1, self.fc2 = StackedLinear(mlp.fc1, num_experts), StackedLinear(mlp.fc2, num_experts)
        self.act, self.drop1, self.drop2 = mlp.act, mlp.drop1, mlp.drop2
        self.hidden = Tap()
        self.register_buffer("heard", torch.ones(num_experts))
        if not copies:
            self.fc1.draw()
            self.fc2.draw()

    def __len__(self) -> int:
        return len(self.heard)

    @property
    def width(self) -> int:
        """H, the hidden units of one expert."""
        return len(self.fc1.weight) // len(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """As many tokens for every expert, (E, C, D), to what they give, (E, C, D)."""
        hidden = _batched(self.fc1, tokens)
        if self.hidden.watched:
            self.hidden(hidden.transpose(0, 1).flatten(1))
        return self.drop2(_batched(self.fc2, self._activate(hidden)))

    def each(self, groups: tuple[Tensor, ...]) -> Tensor:
        """The tokens of expert 0, (n_0, D), of expert 1, ... to what they give, all in a row: (n, D)."""
        # Unbound once: the backward pass of E single rows would fill E stacks with zeros.
        first, second = (zip(fc.weights, fc.biases, strict=True) for fc in (self.fc1, self.fc2))
        hidden = [F.linear(tokens, *fc) for tokens, fc in zip(groups, first, strict=True)]
        if self.hidden.watched:
            self.hidden(pad_sequence(hidden).flatten(1))
        outputs = [F.linear(self._activate(values), *fc) for values, fc in zip(hidden, second, strict=True)]
        return self.drop2(torch.cat(outputs))

    def grouped(self, tokens: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        """Tokens (T, D) in the order of their experts to what they give, (T, D), in two grouped products.

        ends: (E,) int32, where each expert's tokens end. owners: (T,) int64, whose each is. Nothing is read back
        from the device.
        """
        kind = torch.get_autocast_dtype(tokens.device.type) if _autocasts(tokens) else tokens.dtype
        weight1, weight2 = (fc.weights.to(kind).transpose(1, 2) for fc in (self.fc1, self.fc2))
        # Gathered before they are rounded: in half precision a bias' gradient would stall as its tokens are added up.
        bias1, bias2 = (fc.biases[owners].to(kind) for fc in (self.fc1, self.fc2))
        hidden = F.grouped_mm(tokens.to(kind), weight1, offs=ends) + bias1
        return self.drop2(F.grouped_mm(self._activate(hidden), weight2, offs=ends) + bias2)

    def _activate(self, values: Tensor) -> Tensor:
        return self.drop1(self.act(values))


def _batched(fc: StackedLinear, values: Tensor) -> Tensor:
    """(E, C, in) to (E, C, out)."""
    return torch.baddbmm(fc.biases.unsqueeze(1), values, fc.weights.transpose(1, 2))


def _autocasts(tokens: Tensor) -> bool:
    return torch.is_autocast_enabled(tokens.device.type)
