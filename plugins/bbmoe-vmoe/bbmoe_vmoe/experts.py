"""E MLPs of one shape, their weights stacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

# What timm draws the linear layers of a vision transformer with.
INIT_STD = 0.02


class Experts(nn.Module):
    """E experts, each linear-activation-linear like `mlp`: D features in and out, H hidden units.

    copies: every expert starts with the weights of `mlp`; otherwise each is drawn by itself, as timm draws a
    transformer's linear layers. Weights lie expert by expert in dim 0: `weight1` (E, H, D), `bias1` (E, H),
    `weight2` (E, D, H), `bias2` (E, D). `heard` (E,) is what an expert's output is multiplied by: 1, or 0 for
    an expert that is muted.
    """

    heard: Tensor

    def __init__(self, mlp: Mlp, num_experts: int, *, copies: bool) -> None:
        super().__init__()
        self.weight1, self.bias1 = _stack(mlp.fc1, num_experts)
        self.weight2, self.bias2 = _stack(mlp.fc2, num_experts)
        self.act, self.drop1, self.drop2 = mlp.act, mlp.drop1, mlp.drop2
        self.register_buffer("heard", torch.ones(num_experts))
        if not copies:
            for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
                nn.init.trunc_normal_(weight, std=INIT_STD)
                nn.init.zeros_(bias)

    def __len__(self) -> int:
        return len(self.heard)

    def forward(self, tokens: Tensor) -> Tensor:
        """As many tokens for every expert, (E, C, D), to what they give, (E, C, D)."""
        hidden = torch.baddbmm(self.bias1.unsqueeze(1), tokens, self.weight1.transpose(1, 2))
        outputs = torch.baddbmm(self.bias2.unsqueeze(1), self._hidden(hidden), self.weight2.transpose(1, 2))
        return self.drop2(outputs)

    def each(self, groups: tuple[Tensor, ...]) -> Tensor:
        """The tokens of expert 0, (n_0, D), of expert 1, ... to what they give, all in a row: (n, D)."""
        # Unbound once: the backward pass of E single rows would fill E stacks with zeros.
        weights = zip(
            *(p.unbind() for p in (self.weight1, self.bias1, self.weight2, self.bias2)), strict=True
        )
        outputs = [
            F.linear(self._hidden(F.linear(tokens, weight1, bias1)), weight2, bias2)
            for tokens, (weight1, bias1, weight2, bias2) in zip(groups, weights, strict=True)
        ]
        return self.drop2(torch.cat(outputs))

    def grouped(self, tokens: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        """Tokens (T, D) in the order of their experts to what they give, (T, D), in two grouped products.

        ends: (E,) int32, where each expert's tokens end. owners: (T,) int64, whose each is. Nothing is read back
        from the device.
        """
        kind = torch.get_autocast_dtype(tokens.device.type) if _autocasts(tokens) else tokens.dtype
        weight1, weight2 = (w.to(kind).transpose(1, 2) for w in (self.weight1, self.weight2))
        bias1, bias2 = (b.to(kind)[owners] for b in (self.bias1, self.bias2))
        hidden = F.grouped_mm(tokens.to(kind), weight1, offs=ends) + bias1
        return self.drop2(F.grouped_mm(self._hidden(hidden), weight2, offs=ends) + bias2)

    def _hidden(self, values: Tensor) -> Tensor:
        return self.drop1(self.act(values))


def _stack(linear: nn.Module, count: int) -> tuple[nn.Parameter, nn.Parameter]:
    """`count` copies of a linear layer's weight and bias."""
    assert isinstance(linear, nn.Linear) and linear.bias is not None
    weight, bias = linear.weight.detach(), linear.bias.detach()
    return (
        nn.Parameter(weight.expand(count, *weight.shape).clone()),
        nn.Parameter(bias.expand(count, *bias.shape).clone()),
    )


def _autocasts(tokens: Tensor) -> bool:
    return torch.is_autocast_enabled(tokens.device.type)
