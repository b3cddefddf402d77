"""A small network of ConvNeXt blocks, which can be merged because their MLPs process each patch separately."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_image_size, check_sizes
from backdoorbench_moe.moe.structure import ChannelGroup
from backdoorbench_moe.ops.ranges import check_integer

# Value of timm for all norms of ConvNeXt.
NORM_EPS = 1e-6


class ConvNeXt(nn.Module):
    """ConvNeXt blocks at one resolution: a depthwise convolution that mixes patches, then an MLP for each patch.

    Experts that were fine-tuned from such a network can be merged.

    Departures: there is one stage instead of four. By default, the stem consists of overlapping convolutions, and
    kernels are 3x3 instead of 7x7. All weights are drawn from He's normal distribution without a factor for the
    activation. Layer scales are initialised to 1 instead of 1e-6, which suits a network of few blocks.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        features: Features D of a patch, at least 2.
        depth: Number of blocks.
        kernel_size: Side of the depthwise kernels, an odd number.
        stem: "overlap" for 3x3 convolutions of stride 2, which need fewer epochs; "patch" for one convolution on
            disjoint patches, as in the original.
        patch_size: Stride of the stem in pixels, a power of two: 2, 4, 8, ... Stem "overlap" has log2(patch_size)
            convolutions.
        mlp_ratio: Hidden units of each MLP as a multiple of `features`.

    Attributes:
        patch_size: Side of the image tile that belongs to a patch. With stem "overlap", a patch also depends on the
            `patch_size` - 1 pixels to the left of the tile and above it.

    Raises:
        ConfigError: An option is out of range.

    Source:
        Liu et al., "A ConvNet for the 2020s", CVPR 2022; the blocks are timm's.
    """

    tiny: ClassVar[Mapping[str, object]] = {"features": 16, "depth": 2}

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        features: int = 64,
        depth: int = 4,
        kernel_size: int = 3,
        stem: Literal["overlap", "patch"] = "overlap",
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, depth=depth)
        check_image_size(image_size, at_least=2)
        check_integer("features", features, 2)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError.expected("kernel_size", "an odd number of at least 1", kernel_size)
        if not (0 < mlp_ratio < math.inf and int(mlp_ratio * features) >= 1):
            raise ConfigError.expected("mlp_ratio", f"a number of at least 1/{features}", mlp_ratio)
        _check_patch_size(patch_size, image_size)
        self.patch_size, self._side = patch_size, image_size // patch_size
        self.stem = (_overlapping_stem if stem == "overlap" else _patch_stem)(features, patch_size)
        blocks = (
            ConvNeXtBlock(features, kernel_size=kernel_size, mlp_ratio=mlp_ratio, ls_init_value=1.0)
            for _ in range(depth)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(features, eps=NORM_EPS)
        self.head = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        return self.norm(self.blocks(self.stem(images)).mean((2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the hidden units of the last MLP."""
        fc1 = self.blocks[-1].get_submodule("mlp.fc1")
        return {"trunk": [ChannelGroup.whole("trunk", fc1)]}

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs of the blocks; see `moe.structure.Mergeable`."""
        return {
            f"blocks.{number}.mlp": block.get_submodule("mlp") for number, block in enumerate(self.blocks)
        }

    def token_layout(self) -> tuple[tuple[int, int], int]:
        """Return the rows and columns of patches, and 0, since there are no tokens before them."""
        return (self._side, self._side), 0


def _check_patch_size(patch_size: int, image_size: int) -> None:
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise ConfigError.expected("patch_size", "a power of two from 2 on", patch_size)
    if image_size % patch_size:
        raise ConfigError.expected("patch_size", f"a divisor of the image's {image_size} pixels", patch_size)


def _patch_stem(features: int, patch_size: int) -> nn.Sequential:
    """One convolution on disjoint patches, and a norm."""
    return nn.Sequential(
        nn.Conv2d(3, features, patch_size, stride=patch_size), LayerNorm2d(features, eps=NORM_EPS)
    )


def _overlapping_stem(features: int, patch_size: int) -> nn.Sequential:
    """3x3 convolutions of stride 2 with GELUs between them, whose channels double up to `features`, and a norm."""
    count = patch_size.bit_length() - 1
    widths = [3, *(max(1, features >> left) for left in reversed(range(count)))]
    layers: list[nn.Module] = []
    for number in range(count):
        layers.append(nn.Conv2d(widths[number], widths[number + 1], 3, stride=2, padding=1))
        layers.append(nn.GELU() if number < count - 1 else LayerNorm2d(features, eps=NORM_EPS))
    return nn.Sequential(*layers)
