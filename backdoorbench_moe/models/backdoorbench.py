"""The architectures of BackdoorBench, by its names: its own pre-activation ResNet-18, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Resize

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models.checks import check_image_size, check_positive
from backdoorbench_moe.moe.structure import ChannelGroup
from backdoorbench_moe.options import FilePath

PREACT_RESNET18 = "preactresnet18"
# Side that its vision transformers resize images to.
TRANSFORMER_SIDE = 224
TRANSFORMERS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "efficientnet_b0",
    "efficientnet_b3",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "vgg11",
    "vgg16",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
)
ARCHITECTURES = (PREACT_RESNET18, *TORCHVISION, *TRANSFORMERS)
# BackdoorBench has these, too; they end in no linear layer, have several outputs, or are definitions of its own.
NOT_BUILT = ("googlenet", "inception_v3", "resnext29", "senet18", "squeezenet1_0")


class BackdoorBenchModel(nn.Module):
    """An architecture as BackdoorBench builds it, with random weights: "backdoorbench:vgg19_bn".

    The last linear layer is the model's head; all else keeps the names of its weights, behind "trunk.". BackdoorBench
    normalises images outside of the model, here the model does it.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        architecture: Name of the architecture in BackdoorBench.
        mean: Mean of each channel of images in [0, 1], which is subtracted.
        std: Standard deviation of each channel, by which the difference is divided; all above 0.
        weights: The file that the weights were imported from; only `bbmoe import backdoorbench` sets it. A model that
            has it is not trained from the start again.

    Raises:
        UnknownNameError: For an architecture that BackdoorBench does not have.
        ConfigError: For an option out of range.

    Source:
        Wu et al., "BackdoorBench", NeurIPS 2022, and its code, version 2.2: names and shapes of the weights.
    """

    name_argument = "architecture"
    _mean: Tensor
    _std: Tensor

    tiny: ClassVar[Mapping[str, object]] = {"architecture": "shufflenet_v2_x1_0"}

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        architecture: str = PREACT_RESNET18,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        weights: FilePath | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        check_image_size(image_size, at_least=8)
        if architecture in NOT_BUILT:
            raise ConfigError.expected(
                "architecture", f"one that is built here ({', '.join(ARCHITECTURES)})", architecture
            )
        if architecture not in ARCHITECTURES:
            raise UnknownNameError("architecture", architecture, ARCHITECTURES)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError.expected("mean and std", "three values each, those of std above 0", (mean, std))
        self.architecture, self.weights = architecture, weights
        self.normalisation = (tuple(mean), tuple(std))
        self.trunk = _build(architecture, num_classes)
        self._head_name = [
            name for name, layer in self.trunk.named_modules() if isinstance(layer, nn.Linear)
        ][-1]
        head = self.trunk.get_submodule(self._head_name)
        assert isinstance(head, nn.Linear)
        self.head = head
        self.trunk.set_submodule(self._head_name, nn.Identity())
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._try_out(image_size)

    def _try_out(self, image_size: int) -> None:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.eval()(torch.zeros(1, 3, image_size, image_size))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"architecture: {self.architecture} does not take images of {image_size}x{image_size}: {error}"
            ) from None
        finally:
            self.train()

    def own_name(self, name: str) -> str:
        """The name that a weight of BackdoorBench's state dict has in this model's."""
        layer, _, kind = name.rpartition(".")
        return f"head.{kind}" if layer == self._head_name else f"trunk.{name}"

    def their_name(self, name: str) -> str:
        """The name in BackdoorBench's state dict of a weight of this model's; the inverse of `own_name`."""
        part, _, rest = name.partition(".")
        return f"{self._head_name}.{rest}" if part == "head" else rest

    def load_start(self) -> None:
        """Refuse a training: the weights are those of a result, and the run that has it was imported.

        Raises:
            ConfigError: `weights` is set.
        """
        if self.weights is not None:
            raise ConfigError.expected(
                "model.weights",
                "none, as an imported model is not trained again (bbmoe import backdoorbench)",
                self.weights,
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.classify(self.extract_features(images))

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        features: Tensor = self.trunk((images - self._mean) / self._std)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """The head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """The last convolution with a batch norm of its own behind it; of preactresnet18 the last convolution."""
        if isinstance(self.trunk, PreActResNet18):
            last = self.trunk.layer4[-1]
            assert isinstance(last, _Block)
            return {"trunk": [ChannelGroup.whole("trunk", last.conv2)]}
        layers = [
            layer
            for name, layer in self.trunk.named_modules()
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
        ]
        found = [
            ChannelGroup.whole("trunk", layer, after)
            for layer, after in pairwise(layers)
            if isinstance(layer, nn.Conv2d)
            and isinstance(after, nn.BatchNorm2d)
            and after.num_features == layer.out_channels
        ]
        return {"trunk": found[-1:]} if found else {}


class PreActResNet18(nn.Module):
    """BackdoorBench's pre-activation ResNet-18: without a norm behind the last block.

    Args:
        num_classes: Number of classes.

    Source:
        He et al., "Identity Mappings in Deep Residual Networks", 2016; names of the weights as in BackdoorBench.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 64, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(_Block(before, after, stride), _Block(after, after, 1))
            for before, after, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        )
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to logits (B, classes)."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(maps.mean((2, 3)))


class _Block(nn.Module):
    """Two convolutions, each behind a norm and a ReLU, and a shortcut that begins behind the first ReLU."""

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
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + aside


def _conv(before: int, after: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, side, stride, padding=side // 2, bias=False)


def _build(architecture: str, num_classes: int) -> nn.Module:
    if architecture == PREACT_RESNET18:
        return PreActResNet18(num_classes)
    make: Callable[..., Any] = getattr(torchvision.models, architecture)
    network: nn.Module = make(weights=None, num_classes=num_classes)
    if architecture in TRANSFORMERS:
        return nn.Sequential(Resize((TRANSFORMER_SIDE, TRANSFORMER_SIDE)), network)
    return network
