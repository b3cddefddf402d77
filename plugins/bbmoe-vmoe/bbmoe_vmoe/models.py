"""The models `vmoe` and `soft-moe`: a timm vision transformer in which MoE layers replace some MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.layers import (
    ExpertChoiceRouter,
    Experts,
    Router,
    SoftMoELayer,
    SoftRouter,
    SparseMoELayer,
    TopKRouter,
)
from backdoorbench_moe.ops.ranges import check_positive, check_weight
from backdoorbench_moe.options import FilePath
from bbmoe_vmoe.routed_vit import RoutedViT


class VMoE(RoutedViT):
    """V-MoE: a vision transformer of timm in which sparse MoE layers replace some MLPs.

    Class and register tokens are routed like patches but are not part of `Routing`. Router "switch" differs from V-MoE
    only in the number of experts for each token: losses and batch priority are those of V-MoE, not of the Switch
    Transformer.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        vit: Name of the dense transformer in timm. Its blocks must have a plain MLP.
        patch_size: Side of a patch in pixels, a divisor of `image_size`; None for the default of "timm:<vit>".
        depth: Number of blocks; None for the default of the architecture.
        embed_dim: Features of a token; None for the default of the architecture.
        num_heads: Attention heads, a divisor of `embed_dim`; None for the default of the architecture.
        moe_blocks: Blocks whose MLP is replaced, counted from 0: "every-2" (1, 3, 5, ...), "last-N" (the last N of
            these), "all", or numbers such as 3 or "1,3,5".
        num_experts: Experts of each layer.
        router: "top-k": each token goes to `top_k` experts. "switch": each token goes to one expert. "expert-choice":
            each expert selects the same number of tokens of every image, so that a token has `top_k` experts on
            average.
        top_k: 1 to `num_experts`; None for 1 with "switch" and otherwise 2 (1 if there is only one expert).
        gate_std: Standard deviation of the initial weights of the routers.
        noise: Standard deviation of the noise on the routers' logits in training, times `num_experts`. This option and
            the next four have no effect with "expert-choice".
        importance: Weight of the importance loss, which is summed over the layers.
        load: Weight of the load loss, which is summed over the layers.
        capacity: Largest number of tokens of an expert in training, as a multiple of an even load over the batch;
            None for no limit.
        eval_capacity: The same in evaluation. With a limit, an image's output depends on the others in its batch.
        upcycle: None to draw the weights of each expert separately; "copy" to initialise all experts of a layer with
            the same random MLP; otherwise, the folder or model.safetensors of a finished run of the dense transformer.
            Training then starts from its weights, and every expert from those of the MLP it replaces. The trained model
            does not need the file.

    Raises:
        UnknownNameError: timm has no such architecture.
        ConfigError: An option is out of range; the message names it.

    Source:
        Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021.
    """

    tiny: ClassVar[Mapping[str, object]] = {**RoutedViT.tiny, "gate_std": 1.0}

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        vit: str = "vit_tiny_patch16_224",
        patch_size: int | None = None,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        moe_blocks: str | int | tuple[int, ...] = "every-2",
        num_experts: int = 8,
        router: Literal["top-k", "switch", "expert-choice"] = "top-k",
        top_k: int | None = None,
        gate_std: float = 0.02,
        noise: float = 1.0,
        importance: float = 0.005,
        load: float = 0.005,
        capacity: float | None = 1.05,
        eval_capacity: float | None = None,
        upcycle: FilePath | Literal["copy"] | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            vit=vit,
            patch_size=patch_size,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            moe_blocks=moe_blocks,
            num_experts=num_experts,
            upcycle=upcycle,
        )
        self.router, self.top_k = router, _top_k(router, top_k, num_experts)
        check_weight(gate_std=gate_std, noise=noise, importance=importance, load=load)
        check_positive(capacity=capacity, eval_capacity=eval_capacity)
        self._router_options: dict[str, Any] = {"top_k": self.top_k, "gate_std": gate_std}
        if router != "expert-choice":
            self._router_options |= {"noise": noise, "importance": importance, "load": load}
            self._router_options |= {"capacity": capacity, "eval_capacity": eval_capacity}
        self.eval_capacity = eval_capacity
        self.insert_experts()

    def make_layer(self, experts: Experts, *, name: str, num_prefix_tokens: int) -> SparseMoELayer:
        """Build a sparse layer with the chosen router."""
        kind = ExpertChoiceRouter if self.router == "expert-choice" else TopKRouter
        router: Router = kind(self.network.embed_dim, self.num_experts, **self._router_options)
        return SparseMoELayer(experts, router, name=name, num_prefix_tokens=num_prefix_tokens)


class SoftMoE(RoutedViT):
    """Soft MoE: experts process mixtures of an image's tokens, and no token is dropped.

    See `SoftMoELayer` for the definition of its routing.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels.
        vit: Name of the dense transformer in timm. Its blocks must have a plain MLP.
        patch_size: Side of a patch in pixels, a divisor of `image_size`; None for the default of "timm:<vit>".
        depth: Number of blocks; None for the default of the architecture.
        embed_dim: Features of a token; None for the default of the architecture.
        num_heads: Attention heads, a divisor of `embed_dim`; None for the default of the architecture.
        moe_blocks: Blocks whose MLP is replaced, as for `vmoe`.
        num_experts: Experts of each layer.
        slots: Slots of each expert; None for about one slot per patch in total.
        upcycle: Initial weights of the experts, as for `vmoe`.

    Raises:
        UnknownNameError: timm has no such architecture.
        ConfigError: An option is out of range; the message names it.

    Source:
        Puigcerver et al., "From Sparse to Soft Mixtures of Experts", ICLR 2024.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        vit: str = "vit_tiny_patch16_224",
        patch_size: int | None = None,
        depth: int | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        moe_blocks: str | int | tuple[int, ...] = "every-2",
        num_experts: int = 8,
        slots: int | None = None,
        upcycle: FilePath | Literal["copy"] | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            image_size=image_size,
            vit=vit,
            patch_size=patch_size,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            moe_blocks=moe_blocks,
            num_experts=num_experts,
            upcycle=upcycle,
        )
        if slots is not None and slots < 1:
            raise ConfigError.expected("slots", "an integer of at least 1", slots)
        rows, columns = self.patch_grid
        self.slots = max(1, rows * columns // num_experts) if slots is None else slots
        self.insert_experts()

    def make_layer(self, experts: Experts, *, name: str, num_prefix_tokens: int) -> SoftMoELayer:
        """Build a soft layer."""
        router = SoftRouter(self.network.embed_dim, self.num_experts, self.slots)
        return SoftMoELayer(experts, router, name=name, num_prefix_tokens=num_prefix_tokens)


def _top_k(router: str, top_k: int | None, num_experts: int) -> int:
    if router == "switch":
        if top_k not in (None, 1):
            raise ConfigError.expected("top_k", "1, or none, for router 'switch'", top_k)
        return 1
    if top_k is None:
        top_k = min(2, num_experts)
    if not 1 <= top_k <= num_experts:
        raise ConfigError.expected("top_k", f"1 to {num_experts}, the number of experts", top_k)
    return top_k
