"""Base class of the models `vmoe` and `soft-moe`: a timm vision transformer in which MoE layers replace some MLPs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.base import Origin
from backdoorbench_moe.moe.layers import Experts, MLPExperts, MoELayer, MoEModel
from backdoorbench_moe.moe.structure import ChannelGroup
from bbmoe_vmoe.surgery import build_vit, choose_blocks
from bbmoe_vmoe.upcycle import COPY, load_dense, read_dense


class RoutedViT(MoEModel):
    """A timm vision transformer in which MoE layers replace some MLPs.

    A subclass implements `make_layer` and calls `insert_experts` at the end of its `__init__`.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        vit: Name of the dense transformer in timm.
        patch_size: Side of a patch in pixels; None for the size that the model "timm:<vit>" uses for `image_size`.
        depth: Number of blocks; None for the default of the architecture.
        embed_dim: Number of features of a token; None for the default of the architecture.
        num_heads: Number of attention heads; None for the default of the architecture.
        moe_blocks: The blocks whose MLP is replaced, see `choose_blocks`.
        num_experts: Number of experts in each MoE layer, at least 1.
        upcycle: Initial weights of the experts: None, "copy", or a run folder or model file, see `VMoE`.

    Attributes:
        network: The transformer.
        patch_size: Side of a patch in pixels.
        patch_grid: Rows and columns of patches.

    Raises:
        UnknownNameError: timm has no such architecture.
        ConfigError: An option is out of range; the message names it.
    """

    network: VisionTransformer

    tiny: ClassVar[Mapping[str, object]] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_experts": 4}

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        vit: str,
        patch_size: int | None,
        depth: int | None,
        embed_dim: int | None,
        num_heads: int | None,
        moe_blocks: str | int | tuple[int, ...],
        num_experts: int,
        upcycle: str | None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError.expected("num_experts", "an integer of at least 1", num_experts)
        self.network = build_vit(
            vit,
            num_classes=num_classes,
            image_size=image_size,
            patch_size=patch_size,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
        )
        embed = self.network.patch_embed
        self.patch_size, self.patch_grid = embed.patch_size[0], embed.grid_size
        self.moe_blocks = choose_blocks(moe_blocks, len(self.network.blocks))
        self.num_experts, self.upcycle = num_experts, upcycle
        if upcycle == "":
            raise ConfigError.expected(
                "upcycle", f"{COPY}, or a file or run folder of the dense model", upcycle
            )

    def insert_experts(self) -> None:
        """Replace the MLPs of the blocks in `moe_blocks` with MoE layers."""
        for number in self.moe_blocks:
            block = self.network.blocks[number]
            experts = MLPExperts.like(
                block.get_submodule("mlp"), num_experts=self.num_experts, copies=self.upcycle is not None
            )
            name, prefix = f"network.blocks.{number}.mlp", self.network.num_prefix_tokens
            block.mlp = self.make_layer(experts, name=name, num_prefix_tokens=prefix)

    @abstractmethod
    def make_layer(self, experts: Experts, *, name: str, num_prefix_tokens: int) -> MoELayer:
        """Build the MoE layer that replaces one MLP. The arguments are those of `MoELayer`."""

    def load_start(self) -> Origin | None:
        """Load the weights of the dense model if `upcycle` is a run folder or a file; otherwise do nothing.

        The attribute `upcycled_from` is then set to the SHA-256 of the file.

        Raises:
            ConfigError: The file does not exist, or its weights do not fit.
        """
        if self.upcycle is None or self.upcycle == COPY:
            return None
        tensors, origin = read_dense(self.upcycle)
        load_dense(self, tensors, num_experts=self.num_experts, source=self.upcycle)
        self.upcycled_from = origin.sha256
        return origin

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to features (B, D), the input of the classifier."""
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True)

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.network.get_classifier()(features)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the experts and routers of all MoE layers, and the classifier."""
        return {**super().components(), "head": [self.network.get_classifier()]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the hidden units of each expert in the last MoE layer, and those of the last dense MLP before it."""
        number = self.moe_blocks[-1]
        dense = [block.mlp for block in self.network.blocks[:number] if isinstance(block.mlp, Mlp)]
        trunk = {"trunk": [ChannelGroup.whole("trunk", dense[-1].fc1)]} if dense else {}
        return {**super().prunable(), **trunk}
