"""PreActResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_image_size, check_sizes
from backdoorbench_moe.moe.structure import ChannelGroup

# Below 8 channels, oneDNN's backward pass of a strided 1x1 convolution writes out of bounds on CPUs with AVX2 but
# without AVX-512 (torch 2.14.1: heap corruption with one thread, a hang with two).
MIN_WIDTH = 8


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


class PreActBlock(nn.Module):
    """Pre-activation block: BN, ReLU, 3x3 convolution with a stride, BN, ReLU, 3x3 convolution, and a shortcut.

    If the shape changes, the shortcut is a 1x1 convolution of the activated input, otherwise the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = _conv(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        active = F.relu(self.norm1(features), inplace=True)
        kept = features if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.norm2(self.conv1(active)), inplace=True))


class PreActResNet18(nn.Module):
    """PreActResNet-18: a 3x3 stem and 4 stages of 2 blocks, with strides 1, 2, 2, 2.

    It has the final batch norm and ReLU of the paper, which the implementation in many backdoor toolboxes omits.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, at least 8.
        width: Channels of the first stage, at least 8; the others have 2, 4 and 8 times as many.

    Raises:
        ConfigError: An option is out of range.

    Source:
        He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """

    tiny: ClassVar[Mapping[str, object]] = {"width": 8}

    def __init__(self, *, num_classes: int = 10, image_size: int = 32, width: int = 64) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        if width < MIN_WIDTH:
            raise ConfigError.expected(
                "width", f"at least {MIN_WIDTH} (narrower shortcuts crash oneDNN on some CPUs)", width
            )
        check_image_size(image_size, at_least=8)
        self.stem = _conv(3, width, 3)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                blocks.append(PreActBlock(channels, width * 2**stage, stride=stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        features = self.blocks(self.stem(images))
        return F.relu(self.norm(features), inplace=True).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the last convolution. The input of the following norm is its sum with the shortcut."""
        block = self.blocks[-1]
        assert isinstance(block, PreActBlock)
        return {"trunk": [ChannelGroup.whole("trunk", block.conv2, self.norm)]}
