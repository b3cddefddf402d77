"""The dense twin of pMoE: the same trunk, with a third group in the place of the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_image_size, check_positive
from backdoorbench_moe.models.wrn_blocks import (
    WideBlock,
    WideTrunk,
    batch_norm,
    glorot_linear,
    set_bn_momentum,
)
from backdoorbench_moe.moe.structure import ChannelGroup


class WideResNet(nn.Module):
    """Wide residual network of depth 10: groups of one block with 16k, 32k, 64k channels, k = `widen_factor`.

    Strides 1, 2, 2; BN-ReLU, average over the map, dense. The conventions are Keras's, as in pMoE. k need not
    be whole (channels are rounded), so that a twin can cost what another model does. Raises ConfigError for
    sizes below 1. Source: nowazrabbani/pMoE_CNN, `wideresnet.py`. The reference's dense twin
    averages over a window fixed for its images; here it is the whole map, whatever the image size.
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
        check_positive(num_classes=num_classes)
        if not 1 <= widen_factor < math.inf:
            raise ConfigError.expected("widen_factor", "a number from 1 on", widen_factor)
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
        """The head; nothing is routed."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """The last convolution, whose sum with the shortcut the last norm takes."""
        return {"trunk": [ChannelGroup.whole("trunk", self.block3.conv2, self.norm)]}
