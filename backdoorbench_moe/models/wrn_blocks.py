"""The trunk of the wide residual networks of pMoE, with the conventions of Keras that change numbers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm as Keras has it: eps 1e-3, and momentum 0.99, which PyTorch writes as 0.01."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Set how fast running statistics follow the batches, in (0, 1] as PyTorch counts it.

    Keras's 0.01 needs some hundred steps to forget the first ones; a run of few steps needs more. Raises
    ConfigError.
    """
    if not 0 < momentum <= 1:
        raise ConfigError.expected("bn_momentum", "a number in (0, 1]", momentum)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


class SameConv2d(nn.Conv2d):
    """Convolution with Keras's "same" padding, Glorot uniform kernels and zero biases.

    The output side is ceil(input / stride). Where the padding needed is odd, Keras puts the odd row and
    column at the bottom and right; PyTorch's own padding would put it at the top and left.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)

    def reset_parameters(self) -> None:
        """Draw the kernel Glorot uniform; set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        top, bottom = self._padding(input.shape[-2])
        left, right = self._padding(input.shape[-1])
        if (top, left) == (bottom, right):
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride)

    def _padding(self, size: int) -> tuple[int, int]:
        """Rows before and after an axis of `size`."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class WideBlock(nn.Module):
    """Pre-activation block: BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3, plus a 1x1 shortcut of the raw input.

    (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = batch_norm(in_channels)
        self.conv1 = SameConv2d(in_channels, out_channels, 3, stride=stride)
        self.norm2 = batch_norm(out_channels)
        self.conv2 = SameConv2d(out_channels, out_channels, 3)
        self.shortcut = SameConv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """Add the block's change to the shortcut of its input."""
        change = self.conv1(F.relu(self.norm1(features), inplace=True))
        change = self.conv2(F.relu(self.norm2(change), inplace=True))
        return self.shortcut(features) + change


class Halving(nn.Sequential):
    """BN-ReLU-conv3x3 of stride 2: (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            batch_norm(channels), nn.ReLU(inplace=True), SameConv2d(channels, channels, 3, stride=2)
        )


class WideTrunk(nn.Sequential):
    """Stem 3 to 16 channels, then one block each of 16k and 32k channels (rounded), strides 1 and 2.

    halvings: so many times the map is halved between stem and blocks; the reference has none. It keeps the
    blocks, where nearly all the work is, as small for large images as they are for 32x32.
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
    """Dense layer with a Glorot uniform kernel and zero bias, as in Keras."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
