"""The dense counterpart of pMoE: the same trunk, with a third block instead of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_image_size, check_sizes
from backdoorbench_moe.models.wrn_blocks import (
    WideBlock,
    WideTrunk,
    batch_norm,
    glorot_linear,
    set_bn_momentum,
)
from backdoorbench_moe.moe.structure import ChannelGroup


class WideResNet(nn.Module):
    """Wide residual network of depth 10: three groups of one block, with strides 1, 2, 2, and a linear head.

    Padding, initialisation and batch norms follow Keras, as in pMoE. The last feature map is averaged over all
    positions; the reference averages over a window of fixed size for 32x32 images.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, at least 4.
        widen_factor: Width w of the network, at least 1, possibly fractional: the blocks have 16 * w, 32 * w and 64 * w
            channels, rounded.
        bn_momentum: Momentum of batch norms as PyTorch defines it, in (0, 1]. The default corresponds to the default
            0.99 of Keras.

    Raises:
        ConfigError: An option is out of range.

    Source:
        nowazrabbani/pMoE_CNN, `wideresnet.py`.
    """

    tiny: ClassVar[Mapping[str, object]] = {"widen_factor": 1}

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        widen_factor: float = 10,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        if not 1 <= widen_factor < math.inf:
            raise ConfigError.expected("widen_factor", "a number of at least 1", widen_factor)
        check_image_size(image_size, at_least=4)
        self.trunk = WideTrunk(widen_factor)
        channels = round(64 * widen_factor)
        self.block3 = WideBlock(round(32 * widen_factor), channels, stride=2)
        self.norm = batch_norm(channels)
        self.head = glorot_linear(channels, num_classes)
        set_bn_momentum(self, bn_momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        features = self.block3(self.trunk(images))
        return F.relu(self.norm(features), inplace=True).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the last convolution. The input of the following norm is its sum with the shortcut."""
        return {"trunk": [ChannelGroup.whole("trunk", self.block3.conv2, self.norm)]}
