"""Any architecture of timm, without pretrained weights and adapted to the image size."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import timm
import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models.checks import check_image_size, check_sizes
from backdoorbench_moe.models.timm_merging import plain_transformer
from backdoorbench_moe.moe.structure import ChannelGroup

# Up to this side, the strided stem of a network for 224x224 images would make the feature map too small.
SMALL_IMAGE = 64
# Parts of module names whose convolutions and MLPs are not on the main path: shortcuts and relative positions.
ASIDE = ("downsample", "rel_pos")
# The patches of a vision transformer are made smaller if it would otherwise have fewer tokens than an 8x8 grid.
GRID = 8


class TimmModel(nn.Module):
    """Any architecture of timm with random weights: "timm:resnet18" or `architecture="resnet18"`.

    Nothing is downloaded. Models with patches have the attribute `patch_size`. Plain vision transformers can be merged.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        architecture: Name of the architecture in timm.
        small_stem: For convolutional networks: whether to replace the first convolution by a 3x3 convolution with
            stride 1 and remove the max pooling of the stem, as is usual on CIFAR. None to do so for images of up to 64
            pixels, if the architecture is made for larger images and its stem has a stride.
        patch_size: For models with patches: side of a patch in pixels, a divisor of `image_size`. None for the default
            of the architecture if it results in at least 64 tokens or `image_size` is at least that of the
            architecture, and otherwise image_size // 8. It must be set if neither divides the image.
        depth: For transformers: number of blocks; None for the default of the architecture.
        embed_dim: For transformers: features of a token; None for the default of the architecture.
        num_heads: For transformers: attention heads, a divisor of `embed_dim`; None for the default of the
            architecture.

    Raises:
        UnknownNameError: timm has no such architecture.
        ConfigError: The architecture does not take an option or the image size.
    """

    name_argument = "architecture"
    # The names in weight files of timm do not have this prefix.
    published_prefix = "network."

    tiny: ClassVar[Mapping[str, object]] = {"architecture": "test_resnet"}

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        architecture: str = "resnet18",
        small_stem: bool | None = None,
        patch_size: int | None = None,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes)
        check_image_size(image_size, at_least=1)
        self.check_architecture(architecture)
        outline = _outline(architecture)
        options: dict[str, Any] = {"num_classes": num_classes}
        if _takes(outline, "img_size"):
            options["img_size"] = image_size
        chosen = _choose_patch_size(architecture, outline, image_size, patch_size)
        if chosen is not None:
            options["patch_size"] = chosen
        options |= _choose_sizes(architecture, outline, depth=depth, embed_dim=embed_dim, num_heads=num_heads)
        self.architecture = architecture
        self.network = _build(architecture, image_size=image_size, **options)
        # Name of the weight that published weights do not fit, for the error message.
        self.small_stem_weight = ""
        # Why weights that fit may belong to the published stem: its convolution has this shape, too.
        self.stem_doubt = ""
        if _wants_small_stem(architecture, self.network, image_size, small_stem):
            published = _first_conv(self.network)
            assert published is not None
            shape, stride = published.weight.shape, max(published.stride)
            _shrink_stem(self.network)
            self.small_stem_weight = f"network.{_first_conv_name(self.network)}.weight"
            if small_stem is None and shape[2:] == (3, 3):
                self.stem_doubt = (
                    f"model.small_stem: for images of at most {SMALL_IMAGE}x{SMALL_IMAGE}, the first convolution of "
                    f"timm's {architecture!r} got stride 1 here, and the weights also fit the published stride "
                    f"{stride}; set it to false if the model was trained with the published stem, otherwise to true"
                )
        tokens = _patch_embed(self.network)
        if tokens is not None:
            self.patch_size = tokens.patch_size[0]
        self._try_out(architecture, image_size)

    @staticmethod
    def check_architecture(architecture: str) -> None:
        """Raise UnknownNameError if timm has no such architecture."""
        if not timm.is_model(architecture):
            names = timm.list_models()
            near = difflib.get_close_matches(architecture, names, n=8, cutoff=0.4)
            hint = f" ... ({len(names)} architectures, see timm.list_models())"
            raise UnknownNameError("architecture", architecture, near or ["resnet18"], hint)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
        return self.network(images)

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the last linear layer.

        Raises:
            ConfigError: The architecture does not end in a single linear layer.
        """
        self._check_features()
        return self._run(images)[1][0].flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes).

        Raises:
            ConfigError: The architecture does not end in a single linear layer.
        """
        self._check_features()
        return _apply_flat(self._last_layer(), features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the head if timm has one with weights."""
        head = self.network.get_classifier()  # type: ignore[operator]
        named = isinstance(head, nn.Module) and any(True for _ in head.parameters())
        return {"head": [head]} if named else {}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the last convolution with its own batch norm, outside shortcuts, or hidden layer of an MLP."""
        kinds = (nn.Conv2d, nn.BatchNorm2d, Mlp)
        modules = [(name, m) for name, m in self.network.named_modules() if isinstance(m, kinds)]
        found = [
            group
            for (name, module), (_, after) in pairwise([*modules, ("", nn.Identity())])
            if not any(part in name for part in ASIDE) and (group := _prunable(module, after))
        ]
        return {"trunk": found[-1:]} if found else {}

    def mlps(self) -> dict[str, nn.Module]:
        """Return the MLPs of a plain vision transformer; see `moe.structure.Mergeable`.

        Raises:
            ConfigError: The architecture is not a plain vision transformer.
        """
        blocks = plain_transformer(self.network, self.architecture).blocks
        return {
            f"network.blocks.{number}.mlp": block.get_submodule("mlp") for number, block in enumerate(blocks)
        }

    def token_layout(self) -> tuple[tuple[int, int], int]:
        """Return the rows and columns of patches of a plain vision transformer, and the number of tokens before them.

        Raises:
            ConfigError: The architecture is not a plain vision transformer.
        """
        network = plain_transformer(self.network, self.architecture)
        return network.patch_embed.grid_size, network.num_prefix_tokens

    def _last_layer(self) -> nn.Module:
        """Return the last linear layer or convolution of timm's classifier, or an unused module if there is none."""
        head = self.network.get_classifier()  # type: ignore[operator]
        inside = head.modules() if isinstance(head, nn.Module) else ()
        return next(reversed([m for m in inside if isinstance(m, nn.Linear | nn.Conv2d)]), nn.Identity())

    def _run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the network; return the logits and the inputs of all calls of the last layer."""
        seen: list[Tensor] = []
        with self._last_layer().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            return self.network(images), seen

    def _check_features(self) -> None:
        if not self._has_features:
            raise ConfigError(
                f"model: timm's {self.architecture!r} does not end in one linear layer, "
                "so it has no features before its head"
            )

    def _try_out(self, architecture: str, image_size: int) -> None:
        """Run one image to check that the strides fit its size, and to find the input of the last layer."""
        self.network.eval()
        image = torch.linspace(0, 1, 3 * image_size**2).reshape(1, 3, image_size, image_size)
        with torch.no_grad():
            try:
                logits, seen = self._run(image)
            except Exception as error:
                raise _unfit(architecture, image_size, error) from error
            self._has_features = len(seen) == 1 and seen[0].numel() == seen[0].shape[1]
            if self._has_features and not logits.is_meta:
                self._has_features = torch.equal(_apply_flat(self._last_layer(), seen[0].flatten(1)), logits)
        self.network.train()


def _apply_flat(layer: nn.Module, features: Tensor) -> Tensor:
    """Apply a linear layer, or a convolution on a map of one cell, to features (B, D); returns (B, classes)."""
    return layer(features[..., None, None] if isinstance(layer, nn.Conv2d) else features).flatten(1)


def _prunable(module: nn.Module, after: nn.Module) -> ChannelGroup | None:
    """Return the channels of a convolution that is directly followed by its batch norm, or hidden units of an MLP."""
    if isinstance(module, Mlp) and isinstance(module.fc1, nn.Linear):
        return ChannelGroup.whole("trunk", module.fc1)
    if not isinstance(module, nn.Conv2d) or not isinstance(after, nn.BatchNorm2d):
        return None
    return ChannelGroup.whole("trunk", module, after) if after.num_features == module.out_channels else None


def _build(architecture: str, *, image_size: int | None, **options: Any) -> nn.Module:
    try:
        return timm.create_model(architecture, pretrained=False, **options)
    except Exception as error:
        raise _unfit(architecture, image_size, error) from error


@functools.lru_cache(maxsize=16)
def _outline(architecture: str) -> nn.Module:
    """Build an architecture with its default options and without weights, to look at; it must not be changed.

    It is kept, because timm takes half a second to initialise a transformer on the meta device, and the check of a
    suite builds the same architecture for every run.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _build(architecture, image_size=None)


def _unfit(architecture: str, image_size: int | None, error: Exception) -> ConfigError:
    if "'patch_size'" in str(error):  # A TypeError: the builder of the architecture also passes patch_size.
        return ConfigError(
            f"patch_size: timm's {architecture!r} has a fixed patch size, too large here; set patch_size to keep it"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "divisible by num_heads" in reason:
        return ConfigError(f"num_heads: expected a divisor of the embed_dim of timm's {architecture!r}")
    size = "the options" if image_size is None else f"{image_size}x{image_size} images"
    return ConfigError(f"architecture: timm's {architecture!r} does not take {size} ({reason})")


def _takes(network: nn.Module, option: str) -> bool:
    return option in inspect.signature(type(network).__init__).parameters


def _native_size(network: nn.Module) -> int:
    return network.default_cfg.get("input_size", (3, 224, 224))[-1]  # type: ignore[union-attr, operator]


def _patch_embed(network: nn.Module) -> PatchEmbed | None:
    return next((module for module in network.modules() if isinstance(module, PatchEmbed)), None)


def _choose_patch_size(
    architecture: str, outline: nn.Module, image_size: int, wanted: int | None
) -> int | None:
    """Return the patch size to build with; None for the default of the architecture."""
    embed = _patch_embed(outline)
    if wanted is not None:
        if not _takes(outline, "patch_size") or embed is None:
            raise ConfigError(f"patch_size: timm's {architecture!r} has no patches to size, got {wanted}")
        if wanted < 1 or image_size % wanted:
            raise ConfigError.expected("patch_size", f"a divisor of the image's {image_size} pixels", wanted)
        return wanted if wanted != embed.patch_size[0] else None
    if embed is None or not _takes(outline, "patch_size"):
        return None
    own = embed.patch_size[0]
    at_home = image_size >= _native_size(outline)
    if image_size % own == 0 and (at_home or image_size // own >= GRID):
        return None
    if image_size % GRID == 0:
        return image_size // GRID
    if image_size % own == 0:
        return None
    fit = ", ".join(str(size) for size in range(1, image_size + 1) if image_size % size == 0)
    raise ConfigError(
        f"patch_size: timm's {architecture!r} has patches of {own}, and neither they nor an eighth divide "
        f"{image_size} pixels; expected one of {fit}"
    )


def _choose_sizes(architecture: str, outline: nn.Module, **sizes: int | None) -> dict[str, int]:
    """Return the sizes that are set. Raise ConfigError if the architecture does not take one or it is below 1."""
    wanted = {name: size for name, size in sizes.items() if size is not None}
    check_sizes(**wanted)
    for name, size in wanted.items():
        annotation = inspect.signature(type(outline).__init__).parameters.get(name)
        # The sizes of a network with several stages are tuples, which cannot be set.
        if annotation is None or not isinstance(annotation.default, int):
            raise ConfigError(f"{name}: timm's {architecture!r} has no such size to choose, got {size}")
    return wanted


def _first_conv_name(network: nn.Module) -> object:
    return network.default_cfg.get("first_conv")  # type: ignore[union-attr, operator]


def _first_conv(network: nn.Module) -> nn.Conv2d | None:
    name = _first_conv_name(network)
    conv = network.get_submodule(name) if isinstance(name, str) else None
    return conv if isinstance(conv, nn.Conv2d) else None


def _wants_small_stem(architecture: str, network: nn.Module, image_size: int, wanted: bool | None) -> bool:
    conv = _first_conv(network)
    fits = conv is not None and max(conv.stride) > 1 and not _takes(network, "img_size")
    if wanted and not fits:
        raise ConfigError(f"small_stem: timm's {architecture!r} has no convolutional stem with a stride")
    if wanted is None:
        return fits and image_size <= SMALL_IMAGE < _native_size(network)
    return wanted


def _shrink_stem(network: nn.Module) -> None:
    """Make the first convolution 3x3 with stride 1, and remove a max pooling that comes before any other stride."""
    conv = _first_conv(network)
    assert conv is not None
    conv.stride, conv.padding, conv.kernel_size = (1, 1), (1, 1), (3, 3)
    conv.weight = nn.Parameter(torch.empty(*conv.weight.shape[:2], 3, 3))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    modules = list(network.named_modules())
    start = next(place for place, (_, module) in enumerate(modules) if module is conv)
    for name, module in modules[start + 1 :]:
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
            return
        if isinstance(module, nn.MaxPool2d):
            network.set_submodule(name, nn.Identity())
            return
