"""pMoE: a wide residual network with expert-choice routing of the patches of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_positive
from backdoorbench_moe.models.wrn_blocks import (
    SameConv2d,
    WideTrunk,
    batch_norm,
    glorot_linear,
    set_bn_momentum,
)
from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.moe.precision import full_precision
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.moe.structure import ChannelGroup, Expert


class PatchRouter(nn.Module):
    """Expert-choice router: in each image, every expert selects the K cells of the map with the largest gates.

    Gates are computed in fp32 also under autocast: bf16 has too few digits to rank 64 gates that are nearly equal.

    Args:
        channels: Channels of the map.
        num_experts: Number of experts E.
        top_k: Cells K that each expert selects.
        gate_std: Standard deviation of the initial weights.
    """

    def __init__(self, channels: int, *, num_experts: int, top_k: int, gate_std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, channels))
        nn.init.normal_(self.weight, std=gate_std)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the routing of a map.

        Args:
            features: (B, C, H, W), with P = H * W cells.

        Returns:
            Gates (B, E, P) float32, a softmax over the cells, and selected (B, E, P) bool.
        """
        with full_precision(features.device):
            cells = features.flatten(2).to(self.weight.dtype)
            gates = torch.matmul(self.weight, cells).float().softmax(dim=-1)
            return gates, select_top(gates, self.top_k)


def select_top(gates: Tensor, top_k: int) -> Tensor:
    """Mark the largest gates.

    Args:
        gates: (..., P).
        top_k: Number K of gates to mark in each row.

    Returns:
        (..., P) bool, True for exactly K entries of each row. Of equal gates, the first are marked.
    """
    best = gates.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, best, True)


class PatchMoE(nn.Module):
    """E experts of batch norm, ReLU and 1x1 convolution, each on its own weighted copy of the map.

    The channels of `norm` and `conv` are grouped by expert: expert e has the in_channels input channels from
    e * in_channels and the out_channels output channels from e * out_channels.

    Args:
        in_channels: Channels of the map.
        out_channels: Output channels of each expert.
        num_experts: Number of experts E.
        top_k: Cells that each expert selects.
        gate_std: Standard deviation of the router's initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_experts: int, top_k: int, gate_std: float
    ) -> None:
        super().__init__()
        self.router = PatchRouter(in_channels, num_experts=num_experts, top_k=top_k, gate_std=gate_std)
        self.norm = batch_norm(num_experts * in_channels)
        self.conv = nn.Conv2d(num_experts * in_channels, num_experts * out_channels, 1, groups=num_experts)
        # Glorot uniform for the kernel of one expert; PyTorch would count the outputs of all groups as one fan-out.
        bound = math.sqrt(6 / (in_channels + out_channels))
        nn.init.uniform_(self.conv.weight, -bound, bound)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all experts.

        A cell that an expert did not select enters it as zeros, counts in its batch statistics, and leaves it as the
        same constant for all such cells.

        Args:
            features: (B, C, H, W).

        Returns:
            Outputs (B, E * out_channels, H, W), gates (B, E, P) and selected (B, E, P).
        """
        gates, selected = self.router(features)
        weights = (gates * selected).to(features.dtype).transpose(1, 2).contiguous()
        cells = features.flatten(2).transpose(1, 2)
        # With contiguous `weights`, the product has the memory layout (B, P, E, C), and its view as (B, E * C, H, W)
        # is channels_last. If `weights` were a transposed view, the layout would be (B, E, P, C) and need a copy.
        routed = cells.unsqueeze(2) * weights.unsqueeze(3)
        routed = routed.flatten(2).transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.conv(F.relu(self.norm(routed), inplace=True)), gates, selected


class PMoE(RoutedModel):
    """pMoE: a wide residual trunk, and experts that each select cells of its last map.

    With `patch_size` 4, the model is the reference's, whose map has a quarter of the image's side. With 8, 16, ... the
    map is halved one or more times before the first block (see `Halving`), so that the trunk costs about as much for
    64x64 images by 8 as for 32x32 images by 4. The reference ends in a softmax; this model returns logits.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side in pixels of the image tile that belongs to a cell: 4, 8, 16, ...
        widen_factor: The blocks of the trunk have 16 and 32 times as many channels.
        moe_channels: Channels of the map that is routed.
        expert_channels: Output channels of each expert.
        num_experts: Number of experts.
        top_k: Cells that each expert selects, 1 to the number of cells.
        gate_std: Standard deviation of the router's initial weights. The default is that of the reference's code; the
            paper's N(0, 1e-4) could also be read as a variance.
        bn_momentum: Momentum of batch norms in (0, 1], as PyTorch counts it; the default is 0.99 in Keras.

    Raises:
        ConfigError: For an option out of range.

    Source: Chowdhury et al., "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional
    Neural Networks", ICML 2023; code nowazrabbani/pMoE_CNN, `wideresnet_moe.py`.
    """

    tiny: ClassVar[Mapping[str, object]] = {
        "widen_factor": 1,
        "moe_channels": 16,
        "expert_channels": 8,
        "top_k": 6,
        "gate_std": 1.0,
    }

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        widen_factor: int = 10,
        moe_channels: int = 640,
        expert_channels: int = 160,
        num_experts: int = 4,
        top_k: int = 16,
        gate_std: float = 1e-4,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        check_positive(
            num_classes=num_classes,
            widen_factor=widen_factor,
            moe_channels=moe_channels,
            expert_channels=expert_channels,
            num_experts=num_experts,
        )
        if patch_size < 4 or patch_size.bit_count() != 1:
            raise ConfigError.expected("patch_size", "a power of two from 4 on", patch_size)
        if image_size < patch_size or image_size % patch_size:
            shape = f"a positive multiple of {patch_size} (a patch is {patch_size}x{patch_size})"
            raise ConfigError.expected("image_size", shape, image_size)
        side = image_size // patch_size
        cells = side**2
        if not 1 <= top_k <= cells:
            raise ConfigError.expected("top_k", f"1 to {cells}, the patches of the image", top_k)
        if not 0 <= gate_std < math.inf:
            raise ConfigError.expected("gate_std", "a finite number from 0 on", gate_std)
        self.image_size, self.patch_size = image_size, patch_size
        self.patch_grid = (side, side)
        # Both the trunk and `reduce` halve the map once.
        self.trunk = WideTrunk(widen_factor, halvings=(patch_size // 4).bit_length() - 1)
        self.reduce_norm = batch_norm(32 * widen_factor)
        self.reduce = SameConv2d(32 * widen_factor, moe_channels, 3, stride=2)
        self.moe = PatchMoE(
            moe_channels, expert_channels, num_experts=num_experts, top_k=top_k, gate_std=gate_std
        )
        self.norm = batch_norm(num_experts * expert_channels)
        self.head = glorot_linear(num_experts * expert_channels, num_classes)
        set_bn_momentum(self, bn_momentum)

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        """Map images (B, 3, H, W) in [0, 1] to logits and the routing of the one routed layer.

        The gates are a softmax over the cells of one image. Those of the selected cells are not renormalised.
        """
        features, routing = self._features(images)
        return RoutedOutput(self.classify(features), [routing])

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to the features (B, D) before the head."""
        return self._features(images)[0]

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes)."""
        return self.head(features)

    def _features(self, images: Tensor) -> tuple[Tensor, Routing]:
        cells = self.reduce(F.relu(self.reduce_norm(self.trunk(images)), inplace=True))
        outputs, gates, selected = self.moe(cells)
        return F.relu(self.norm(outputs), inplace=True).mean((2, 3)), Routing("moe", gates, selected)

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the modules of the experts, the router and the head.

        The norm behind the experts is one of theirs, since each of its channels belongs to one expert.
        """
        experts: list[nn.Module] = [self.moe.norm, self.moe.conv, self.norm]
        return {"experts": experts, "router": [self.moe.router], "head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the output channels of each expert, and those of the convolution that computes the routed map."""
        experts = len(self.moe.router.weight)
        size = self.moe.conv.out_channels // experts
        groups = [
            ChannelGroup(f"expert {e}", self.moe.conv, e * size, (e + 1) * size, self.norm)
            for e in range(experts)
        ]
        return {"experts": groups, "trunk": [ChannelGroup.whole("trunk", self.reduce)]}

    def experts(self) -> list[Expert]:
        """Return each expert's channels of the experts' norm and convolution, and of the norm behind them."""
        count = len(self.moe.router.weight)
        sizes = {"moe.norm": self.moe.norm, "moe.conv": self.moe.conv, "norm": self.norm}
        found = []
        for e in range(count):
            rows = {
                f"{name}.{key}": (e * len(tensor) // count, (e + 1) * len(tensor) // count)
                for name, module in sizes.items()
                for key, tensor in module.state_dict().items()
                if tensor.ndim
            }
            # The norm behind the convolution is included, since it turns zeros into a constant.
            output = {
                key: rows[key] for key in ("moe.conv.weight", "moe.conv.bias", "norm.weight", "norm.bias")
            }
            found.append(Expert("moe", e, rows, output, self.moe.conv, rows["moe.conv.weight"]))
        return found

    def mask_expert(self, expert: Expert) -> None:
        """Mute the expert. The others are not affected, since each expert selects its patches by itself."""
        mute(self, [expert])
