"""The architectures of BackdoorBench, under its names: its own networks and those of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import Resize

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models.backdoorbench_networks import PreActResNet18, ResNeXt29, SENet18
from backdoorbench_moe.models.checks import check_colours, check_image_size, check_sizes
from backdoorbench_moe.moe.structure import ChannelGroup
from backdoorbench_moe.options import FilePath

# Side to which the vision transformers of BackdoorBench resize images.
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
# Architectures of torchvision, with the names of their auxiliary classifiers.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
OWN: Mapping[str, Callable[[int], nn.Module]] = {
    "preactresnet18": PreActResNet18,
    "resnext29": ResNeXt29,
    "senet18": SENet18,
}
# Architectures of torchvision, with the name of the convolution that is their head: logits are the means of its output
# after a ReLU.
CONVOLUTIONAL = {"squeezenet1_0": "classifier.1"}
ARCHITECTURES = (*OWN, *TORCHVISION, *AUXILIARY, *TRANSFORMERS, *CONVOLUTIONAL)


class BackdoorBenchModel(nn.Module):
    """An architecture as BackdoorBench builds it, with random weights: "backdoorbench:vgg19_bn".

    The last linear layer is the model's head; the other weights keep their names, with the prefix "trunk.".
    BackdoorBench normalises images outside the model; here the model does. The auxiliary classifiers of googlenet and
    inception_v3 keep their weights but are not computed, even in training. The head of squeezenet1_0 is a convolution
    before a ReLU and a mean, so that the model has no features; code that needs features refuses it.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        architecture: Name of the architecture in BackdoorBench.
        mean: Mean of each channel of images in [0, 1], for normalisation.
        std: Standard deviation of each channel, above 0.
        weights: The file that the weights were imported from, which only `bbmoe import backdoorbench` sets. Such a
            model cannot be trained again from the beginning.

    Raises:
        UnknownNameError: BackdoorBench has no such architecture.
        ConfigError: An option is out of range.

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
        architecture: str = "preactresnet18",
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        weights: FilePath | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_image_size(image_size, at_least=8)
        self.check_architecture(architecture)
        check_colours(mean, std)
        self.architecture, self.weights = architecture, weights
        self.normalisation = (tuple(mean), tuple(std))
        self.trunk = _build(architecture, num_classes)
        self._head_name = ""
        if architecture not in CONVOLUTIONAL:
            self._take_head()
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._try_out(image_size)

    @staticmethod
    def check_architecture(architecture: str) -> None:
        """Raise UnknownNameError if there is no such architecture."""
        if architecture not in ARCHITECTURES:
            raise UnknownNameError("architecture", architecture, ARCHITECTURES)

    def _take_head(self) -> None:
        """Move the last linear layer out of the trunk."""
        self._head_name = [
            name for name, layer in self.trunk.named_modules() if isinstance(layer, nn.Linear)
        ][-1]
        head = self.trunk.get_submodule(self._head_name)
        assert isinstance(head, nn.Linear)
        self.head = head
        self.trunk.set_submodule(self._head_name, nn.Identity())

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
        """Return the name in this model's state dict of a weight in that of BackdoorBench."""
        layer, _, kind = name.rpartition(".")
        return f"head.{kind}" if layer and layer == self._head_name else f"trunk.{name}"

    def their_name(self, name: str) -> str:
        """Return the name in BackdoorBench's state dict of a weight of this model; the inverse of `own_name`."""
        part, _, rest = name.partition(".")
        return f"{self._head_name}.{rest}" if part == "head" else rest

    def load_start(self) -> None:
        """Refuse training if the weights were imported.

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
        found: Tensor = self.trunk((images - self._mean) / self._std)
        return self.head(found) if self._head_name else found

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head.

        Raises:
            ConfigError: The head is not a linear layer.
        """
        self._check_features()
        features: Tensor = self.trunk((images - self._mean) / self._std)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes).

        Raises:
            ConfigError: The head is not a linear layer.
        """
        self._check_features()
        return self.head(features)

    def _check_features(self) -> None:
        if not self._head_name:
            raise ConfigError.expected(
                "model",
                "an architecture whose logits are a linear layer of its features",
                f"{self.architecture}, whose head is a convolution before a ReLU and a mean",
            )

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head."""
        return {
            "head": [
                self.head if self._head_name else self.trunk.get_submodule(CONVOLUTIONAL[self.architecture])
            ]
        }

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the last convolution followed by its own batch norm; for preactresnet18, the last convolution."""
        if isinstance(self.trunk, PreActResNet18):
            last = self.trunk.layer4[-1]
            conv = last.get_submodule("conv2")
            assert isinstance(conv, nn.Conv2d)
            return {"trunk": [ChannelGroup.whole("trunk", conv)]}
        branches = [branch for branch in self.trunk.modules() if isinstance(branch, _NotComputed)]
        not_computed = {layer for branch in branches for layer in branch.modules()}
        layers = [
            layer
            for layer in self.trunk.modules()
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d) and layer not in not_computed
        ]
        found = [
            ChannelGroup.whole("trunk", layer, after)
            for layer, after in pairwise(layers)
            if isinstance(layer, nn.Conv2d)
            and isinstance(after, nn.BatchNorm2d)
            and after.num_features == layer.out_channels
        ]
        return {"trunk": found[-1:]} if found else {}


class _NotComputed(nn.Module):
    """An auxiliary classifier whose weights are kept but which is not computed."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        for name, child in branch.named_children():
            self.add_module(name, child)

    def forward(self, maps: Tensor) -> Tensor:
        return maps


def _build(architecture: str, num_classes: int) -> nn.Module:
    if architecture in OWN:
        return OWN[architecture](num_classes)
    make: Callable[..., Any] = getattr(torchvision.models, architecture)
    if architecture in AUXILIARY:
        network: Any = make(weights=None, num_classes=num_classes, init_weights=False)
        for name in AUXILIARY[architecture]:
            setattr(network, name, _NotComputed(network.get_submodule(name)))
        network.aux_logits = False  # The output is then a tensor in training, too.
        return network
    network = make(weights=None, num_classes=num_classes)
    if architecture in TRANSFORMERS:
        return nn.Sequential(Resize((TRANSFORMER_SIDE, TRANSFORMER_SIDE)), network)
    return network
