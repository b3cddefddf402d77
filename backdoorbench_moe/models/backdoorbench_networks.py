"""Networks that BackdoorBench defines itself, reimplemented with its names of the weights.

Source:
    Names and shapes of the weights: BackdoorBench, version 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F


class PreActResNet18(nn.Module):
    """BackdoorBench's pre-activation ResNet-18, without a norm after the last block.

    Args:
        num_classes: Number of classes.

    Source:
        He et al., "Identity Mappings in Deep Residual Networks", 2016; names of the weights as in BackdoorBench.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_Block)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, classes)."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(maps.mean((2, 3)))


class _Block(nn.Module):
    """Two convolutions, each after a norm and a ReLU, and a shortcut that begins after the first ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, after, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), _conv(after, after, 3)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(_conv(before, after, 1, stride))

    def forward(self, maps: Tensor) -> Tensor:
        active = F.relu(self.bn1(maps))
        aside = maps if self.shortcut is None else self.shortcut(active)
        return self.weigh(self.conv2(F.relu(self.bn2(self.conv1(active))))) + aside

    def weigh(self, maps: Tensor) -> Tensor:
        """Weight the output channels; here they are unchanged."""
        return maps


def _stages(block: Callable[[int, int, int], nn.Module]) -> Iterator[nn.Sequential]:
    """Build the four stages of a ResNet-18, of two blocks each. `block` takes channels before and after, and stride."""
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    return (
        nn.Sequential(block(before, after, stride), block(after, after, 1))
        for before, after, stride in widths
    )


def _conv(before: int, after: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, side, stride, padding=side // 2, bias=False)


class SENet18(nn.Module):
    """BackdoorBench's SENet-18: pre-activation blocks whose output channels are weighted by squeeze and excitation.

    Args:
        num_classes: Number of classes.

    Source:
        Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 3), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_SqueezeBlock)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, classes)."""
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.linear(maps.mean((2, 3)))


class _SqueezeBlock(_Block):
    """A pre-activation block with a weight in [0, 1] for each of its output channels, computed from their means."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(before, after, stride)
        self.fc1, self.fc2 = nn.Conv2d(after, after // 16, 1), nn.Conv2d(after // 16, after, 1)

    def weigh(self, maps: Tensor) -> Tensor:
        means = maps.mean((2, 3), keepdim=True)
        return maps * self.fc2(F.relu(self.fc1(means))).sigmoid()


class ResNeXt29(nn.Module):
    """BackdoorBench's ResNeXt-29 (2x64d): three stages of three blocks, with convolutions in two groups.

    Args:
        num_classes: Number of classes.

    Source:
        Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 1), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                _GroupBlock(before, width, stride), *(_GroupBlock(2 * width, width, 1) for _ in range(2))
            )
            for before, width, stride in ((64, 128, 1), (256, 256, 2), (512, 512, 2))
        )
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, classes)."""
        maps = F.relu(self.bn1(self.conv1(images)))
        return self.linear(self.layer3(self.layer2(self.layer1(maps))).mean((2, 3)))


class _GroupBlock(nn.Module):
    """A bottleneck of `width` channels with a 3x3 convolution in two groups, and 2 * `width` output channels."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, width, 1), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != 2 * width:
            self.shortcut = nn.Sequential(_conv(before, 2 * width, 1, stride), nn.BatchNorm2d(2 * width))

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(maps)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(maps))
