"""The trunk of pMoE and of its dense counterpart, with the conventions of Keras that affect results."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.ops.ranges import check_interval


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with Keras's defaults: eps 1e-3 and momentum 0.99, which is 0.01 in PyTorch."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of all batch norms of a model.

    With Keras's default, running statistics depend on their initial values for some hundred steps. Short runs need a
    larger momentum.

    Args:
        model: The model.
        momentum: Momentum as PyTorch defines it, in (0, 1].

    Raises:
        ConfigError: `momentum` is out of range.
    """
    check_interval("bn_momentum", momentum, "(0, 1]")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


class SameConv2d(nn.Conv2d):
    """Convolution with Keras's "same" padding, Glorot uniform kernels and zero biases.

    The output side is ceil(input / stride). If the total padding is odd, Keras pads one row and column more at the
    bottom and right than at the top and left.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)

    def reset_parameters(self) -> None:
        """Draw the kernel from a Glorot uniform distribution and set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        top, bottom = self._padding(input.shape[-2])
        left, right = self._padding(input.shape[-1])
        if (top, left) == (bottom, right):
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride)

    def _padding(self, size: int) -> tuple[int, int]:
        """Padding before and after an axis of `size`."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class WideBlock(nn.Module):
    """Pre-activation block: BN, ReLU, 3x3 convolution with a stride, BN, ReLU, 3x3 convolution, and a shortcut.

    The shortcut is always a 1x1 convolution of the input before activation.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = batch_norm(in_channels)
        self.conv1 = SameConv2d(in_channels, out_channels, 3, stride=stride)
        self.norm2 = batch_norm(out_channels)
        self.conv2 = SameConv2d(out_channels, out_channels, 3)
        self.shortcut = SameConv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        change = self.conv1(F.relu(self.norm1(features), inplace=True))
        change = self.conv2(F.relu(self.norm2(change), inplace=True))
        return self.shortcut(features) + change


class Halving(nn.Sequential):
    """BN, ReLU and a 3x3 convolution of stride 2: (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            batch_norm(channels), nn.ReLU(inplace=True), SameConv2d(channels, channels, 3, stride=2)
        )


class WideTrunk(nn.Sequential):
    """A stem of 16 channels and two blocks, with strides 1 and 2.

    Args:
        widen_factor: Width w: the blocks have 16 * w and 32 * w channels, rounded.
        halvings: How many times the feature map is halved between the stem and the blocks; never in the reference. For
            larger images, they keep the cost of the blocks, which dominates, equal to that for 32x32 images.
    """

    def __init__(self, widen_factor: float, *, halvings: int = 0) -> None:
        super().__init__()
        narrow, wide = round(16 * widen_factor), round(32 * widen_factor)
        self.stem = SameConv2d(3, 16, 3)
        for number in range(1, halvings + 1):
            self.add_module(f"halving{number}", Halving(16))
        self.block1 = WideBlock(16, narrow, stride=1)
        self.block2 = WideBlock(narrow, wide, stride=2)


def glorot_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer with Glorot uniform weights and zero bias, as in Keras."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
