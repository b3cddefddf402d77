"""VGG-16 with batch norm for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from backdoorbench_moe.models.checks import check_image_size, check_sizes
from backdoorbench_moe.moe.structure import ChannelGroup

# Channels of the 13 convolutions as multiples of `width`; "M" is max pooling, which halves the map.
_CONVOLUTIONS = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")


class VGG16BN(nn.Module):
    """VGG-16 with batch norm (configuration D) and one linear layer on the average of the last feature map.

    Layers and initialisation are those of torchvision. As is usual for 32x32 images, a single linear layer replaces the
    three layers of the original, which require the 7x7 feature map of 224x224 images.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, at least 32, since the feature map is halved five times.
        width: Channels of the first two convolutions; the others have 2, 4 and 8 times as many.

    Raises:
        ConfigError: An option is out of range.

    Source:
        Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
    """

    tiny: ClassVar[Mapping[str, object]] = {"width": 8}

    def __init__(self, *, num_classes: int = 10, image_size: int = 32, width: int = 64) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width)
        check_image_size(image_size, at_least=32)
        layers = [item if isinstance(item, str) else item * width for item in _CONVOLUTIONS]
        self.features = make_layers(layers, batch_norm=True)
        self.head = nn.Linear(8 * width, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        return self.features(images).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the last convolution."""
        *_, conv, norm, _, _ = self.features  # The last two are a ReLU and a max pooling.
        return {"trunk": [ChannelGroup.whole("trunk", conv, norm)]}
