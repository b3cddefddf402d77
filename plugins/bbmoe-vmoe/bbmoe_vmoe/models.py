"""The models: a timm vision transformer with experts in some of its blocks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput
from backdoorbench_moe.moe.structure import ChannelGroup, Expert
from bbmoe_vmoe.experts import Experts
from bbmoe_vmoe.layers import MoELayer, SoftLayer, SoftRouter, SparseLayer, collecting
from bbmoe_vmoe.routers import ExpertChoiceRouter, Router, TopKRouter
from bbmoe_vmoe.surgery import build_vit, choose_blocks
from bbmoe_vmoe.upcycle import COPY, load_dense, read_dense


class RoutedViT(RoutedModel):
    """What `vmoe` and `soft-moe` share: `network`, timm's transformer with experts in the place of some MLPs."""

    # For the conformance tests: small, and with gates so far apart that no rounding decides.
    tiny: ClassVar[dict[str, object]] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_experts": 4}

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
            raise ConfigError.expected("num_experts", "a whole number from 1", num_experts)
        self.network = build_vit(
            vit,
            num_classes=num_classes,
            image_size=image_size,
            patch_size=patch_size,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
        )
        self.patch_size, self.patch_grid = (
            self.network.patch_embed.patch_size[0],
            self.network.patch_embed.grid_size,
        )
        self.moe_blocks = choose_blocks(moe_blocks, len(self.network.blocks))
        self.num_experts, self.upcycle = num_experts, upcycle
        if upcycle == "":
            raise ConfigError.expected(
                "upcycle", f"{COPY}, or a file or run folder of the dense model", upcycle
            )

    def insert_experts(self) -> None:
        """Put layers of experts in the place of the chosen MLPs."""
        for number in self.moe_blocks:
            block = self.network.blocks[number]
            mlp = block.mlp
            assert isinstance(block, nn.Module) and isinstance(mlp, Mlp)
            experts = Experts(mlp, self.num_experts, copies=self.upcycle is not None)
            name = f"network.blocks.{number}.mlp"
            block.mlp = self.make_layer(experts, name=name, prefix=self.network.num_prefix_tokens)

    def load_start(self) -> None:
        """Load the dense weights that `upcycle` names, if it names a file; `upcycled_from` is then its SHA-256."""
        if self.upcycle not in (None, COPY):
            tensors, self.upcycled_from = read_dense(self.upcycle)
            load_dense(self, tensors, source=self.upcycle)

    @abstractmethod
    def make_layer(self, experts: Experts, *, name: str, prefix: int) -> MoELayer:
        """A layer of these experts, in the place called `name`."""

    def layers(self) -> list[MoELayer]:
        """The layers of experts, first layer first."""
        return [layer for layer in self.network.modules() if isinstance(layer, MoELayer)]

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Images (B, 3, H, W) in [0, 1] to logits and the routing of every layer of experts."""
        with collecting() as routing:
            logits = self.network(images)
        return RoutedOutput(logits, routing)

    def components(self) -> dict[str, list[nn.Module]]:
        """The layers' experts and routers, and the classifier."""
        layers = self.layers()
        return {
            "experts": [layer.experts for layer in layers],
            "router": [layer.router for layer in layers],
            "head": [self.network.get_classifier()],
        }

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Each expert's hidden units in the last layer of experts, and those of the last dense MLP before it."""
        number = self.moe_blocks[-1]
        experts = self.network.blocks[number].mlp.experts
        assert isinstance(experts, Experts)
        width = experts.width
        groups = [
            ChannelGroup(f"expert {e}", experts.fc1, e * width, (e + 1) * width, tap=experts.hidden)
            for e in range(self.num_experts)
        ]
        dense = [block.mlp for block in self.network.blocks[:number] if isinstance(block.mlp, Mlp)]
        trunk = {"trunk": [ChannelGroup.whole("trunk", dense[-1].fc1)]} if dense else {}
        return {"experts": groups, **trunk}

    def experts(self) -> list[Expert]:
        """Each expert: its rows of the stacked weights; muted by `heard`, which comes after what it gives."""
        found = []
        for layer in self.layers():
            rows = {
                f"{layer.name}.experts.{key}": len(tensor) // self.num_experts
                for key, tensor in layer.experts.state_dict().items()
            }
            for e in range(self.num_experts):
                own = {key: (e * size, (e + 1) * size) for key, size in rows.items()}
                output = {key: rows for key, rows in own.items() if key.endswith(".heard")}
                found.append(Expert(layer.name, e, own, output, layer.tap, (e, e + 1)))
        return found

    @torch.no_grad()
    def mask_expert(self, expert: Expert) -> None:
        """Let no token go to, or listen to, this expert any more; the router's softmax leaves it out."""
        layer = self.get_submodule(expert.layer)
        layer.router.masked[expert.index] = True  # type: ignore[union-attr, index, operator]


class VMoE(RoutedViT):
    """V-MoE on any of timm's plain vision transformers: sparse experts in the place of some MLPs.

    vit, patch_size, depth, embed_dim, num_heads: the dense transformer, as "timm:<vit>" with these options.
    moe_blocks: see `surgery.choose_blocks`. router: "top-k", each token takes `top_k` of `num_experts` experts;
    "switch", the same with one; "expert-choice", each expert takes its tokens of every image, `top_k` experts
    a token on average. top_k: 1 for "switch", otherwise 2 where None. gate_std: what the routers' weights are
    drawn with. noise: standard deviation of the noise on the routers' logits in training, times 1 / num_experts.
    importance, load: weights of the losses that keep the experts evenly loaded, summed over the layers. capacity:
    room of the experts in training, as a multiple of an even load over the batch; None is no limit. eval_capacity:
    the same in evaluation, where a limit lets an image's answer hang on the others in its batch. The last five
    do not matter to "expert-choice".

    upcycle: None draws every expert by itself; "copy" starts all of a layer with one MLP's random weights; else
    the folder, or model.safetensors, of a finished run of the dense transformer: training begins with its weights,
    every expert with those of the MLP it replaces. A trained model does not need the file again.

    The class and register tokens are routed as patches are, but are no part of `Routing`. With "switch" all but
    the number of experts is as in V-MoE (losses, batch priority), not as in the Switch Transformer. Raises
    UnknownNameError or ConfigError naming the option. Source: Riquelme et al., NeurIPS 2021.
    """

    tiny: ClassVar[dict[str, object]] = {**RoutedViT.tiny, "gate_std": 1.0}

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
        upcycle: str | None = None,
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
        _check_from_zero(gate_std=gate_std, noise=noise, importance=importance, load=load)
        _check_positive(capacity=capacity, eval_capacity=eval_capacity)
        self._routing: dict[str, Any] = {"top_k": self.top_k, "gate_std": gate_std}
        if router != "expert-choice":
            self._routing |= {"noise": noise, "importance": importance, "load": load}
            self._routing |= {"capacity": capacity, "eval_capacity": eval_capacity}
        self.eval_capacity = eval_capacity
        self.insert_experts()

    def make_layer(self, experts: Experts, *, name: str, prefix: int) -> SparseLayer:
        """Router, dispatch, experts."""
        kind: type[Router] = ExpertChoiceRouter if self.router == "expert-choice" else TopKRouter
        router = kind(self.network.embed_dim, self.num_experts, **self._routing)
        return SparseLayer(experts, router, name=name, prefix=prefix)


class SoftMoE(RoutedViT):
    """Soft MoE on any of timm's plain vision transformers: experts work on mixtures of tokens, nothing is dropped.

    slots: mixtures for each expert; where None, as many as give about one slot a token. All other options as of
    `vmoe`. For what counts as routing, see `layers.SoftLayer`. Raises UnknownNameError or ConfigError naming
    the option. Source: Puigcerver et al., ICLR 2024.
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
        upcycle: str | None = None,
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
            raise ConfigError.expected("slots", "a whole number from 1", slots)
        rows, columns = self.patch_grid
        self.slots = max(1, rows * columns // num_experts) if slots is None else slots
        self.insert_experts()

    def make_layer(self, experts: Experts, *, name: str, prefix: int) -> SoftLayer:
        """Router and experts."""
        router = SoftRouter(self.network.embed_dim, self.num_experts, self.slots)
        return SoftLayer(experts, router, name=name, prefix=prefix)


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


def _check_from_zero(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConfigError.expected(name, "a finite number from 0", value)


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError.expected(name, "a positive number, or none for no limit", value)
