"""pMoE: a wide residual network in which experts choose patches of the image (expert-choice routing)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.checks import check_sizes
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
    """Expert-choice router: in each image, every expert selects the K cells with its largest gates.

    A cell is one position of the feature map, with the values of all channels. It corresponds to a patch of the image.

    Gates are computed in fp32 even under autocast, because bf16 is too coarse to rank gates that are nearly equal.

    Args:
        channels: Channels of the feature map.
        num_experts: Number E of experts.
        top_k: Number K of cells that each expert selects.
        gate_std: Standard deviation of the initial weights.
    """

    def __init__(self, channels: int, *, num_experts: int, top_k: int, gate_std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, channels))
        nn.init.normal_(self.weight, std=gate_std)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the routing of a batch of feature maps.

        Args:
            features: (B, C, H, W), with P = H * W cells.

        Returns:
            Gates (B, E, P) float32, a softmax over the cells; and the selected cells (B, E, P) bool.
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
    """E experts, each of batch norm, ReLU and 1x1 convolution, which process the cells that they select.

    The input of an expert is the feature map, in which each cell is multiplied by its gate if the expert selected it,
    and by 0 otherwise.

    All experts are computed by one batch norm and one grouped convolution, whose channels are ordered by expert: the
    input channels of expert e start at e * in_channels, and its output channels at e * out_channels.

    Args:
        in_channels: Channels of the feature map.
        out_channels: Output channels of each expert.
        num_experts: Number E of experts.
        top_k: Number of cells that each expert selects.
        gate_std: Standard deviation of the router's initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_experts: int, top_k: int, gate_std: float
    ) -> None:
        super().__init__()
        self.router = PatchRouter(in_channels, num_experts=num_experts, top_k=top_k, gate_std=gate_std)
        self.norm = batch_norm(num_experts * in_channels)
        self.conv = nn.Conv2d(num_experts * in_channels, num_experts * out_channels, 1, groups=num_experts)
        # Glorot uniform with the fan-out of one expert. PyTorch's function would use that of all experts together.
        bound = math.sqrt(6 / (in_channels + out_channels))
        nn.init.uniform_(self.conv.weight, -bound, bound)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs of all experts.

        Cells that an expert did not select are zeros in its input. They are included in the statistics of its batch
        norm, and the expert's output is the same constant for all of them.

        Args:
            features: (B, C, H, W).

        Returns:
            Outputs (B, E * out_channels, H, W), gates (B, E, P) and selected (B, E, P).
        """
        gates, selected = self.router(features)
        weights = (gates * selected).to(features.dtype).transpose(1, 2).contiguous()
        cells = features.flatten(2).transpose(1, 2)
        # Since `weights` are contiguous, the product has the memory layout (B, P, E, C), so that its view of shape
        # (B, E * C, H, W) is channels_last. With a transposed view of `weights`, the layout would be (B, E, P, C),
        # which would have to be copied.
        routed = cells.unsqueeze(2) * weights.unsqueeze(3)
        routed = routed.flatten(2).transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.conv(F.relu(self.norm(routed), inplace=True)), gates, selected


class PMoE(RoutedModel):
    """pMoE: a wide residual network whose experts each select cells of the last feature map.

    A cell is one position of this feature map; it corresponds to a patch of the image. With `patch_size` 4, the model
    is that of the reference code, whose feature map has a quarter of the image's side. For 8, 16, ... the feature map
    is also halved one or more times before the first block (see `Halving`). Then 64x64 images with patches of 8x8 take
    about as much computation as 32x32 images with patches of 4x4.

    Departure: the reference returns the output of a softmax; this model returns logits.

    Args:
        num_classes: Number of classes.
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels, a power of two: 4, 8, 16, ...
        widen_factor: Width w of the network, at least 1: its two blocks have 16 * w and 32 * w channels.
        moe_channels: Channels of the feature map that the experts select cells of.
        expert_channels: Output channels of each expert.
        num_experts: Number of experts.
        top_k: Number of cells that each expert selects in an image, from 1 to (image_size / patch_size)^2.
        gate_std: Standard deviation of the router's initial weights, at least 0. The default is that of the reference
            code. In the paper it is not clear whether N(0, 1e-4) states a standard deviation or a variance.
        bn_momentum: Momentum of batch norms as PyTorch defines it, in (0, 1]. The default corresponds to the default
            0.99 of Keras.

    Raises:
        ConfigError: An option is out of range.

    Source:
        Chowdhury et al., "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional
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
        check_sizes(
            num_classes=num_classes,
            widen_factor=widen_factor,
            moe_channels=moe_channels,
            expert_channels=expert_channels,
            num_experts=num_experts,
        )
        if patch_size < 4 or patch_size.bit_count() != 1:
            raise ConfigError.expected("patch_size", "a power of two, at least 4", patch_size)
        if image_size < patch_size or image_size % patch_size:
            shape = f"a positive multiple of {patch_size} (a patch is {patch_size}x{patch_size})"
            raise ConfigError.expected("image_size", shape, image_size)
        side = image_size // patch_size
        cells = side**2
        if not 1 <= top_k <= cells:
            raise ConfigError.expected("top_k", f"1 to {cells}, the number of patches", top_k)
        if not 0 <= gate_std < math.inf:
            raise ConfigError.expected("gate_std", "a finite number of at least 0", gate_std)
        self.image_size, self.patch_size = image_size, patch_size
        self.patch_grid = (side, side)
        # Besides the halvings, the trunk's second block and `reduce` each halve the feature map: a quarter in total.
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
        """Map images (B, 3, H, W) in [0, 1] to features (B, D), the input of the head."""
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

        The batch norm after the experts is part of "experts", because each of its channels belongs to one expert.
        """
        experts: list[nn.Module] = [self.moe.norm, self.moe.conv, self.norm]
        return {"experts": experts, "router": [self.moe.router], "head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the output channels of each expert, and of the convolution that computes the experts' input."""
        experts = len(self.moe.router.weight)
        size = self.moe.conv.out_channels // experts
        groups = [
            ChannelGroup(f"expert {e}", self.moe.conv, e * size, (e + 1) * size, self.norm)
            for e in range(experts)
        ]
        return {"experts": groups, "trunk": [ChannelGroup.whole("trunk", self.reduce)]}

    def experts(self) -> list[Expert]:
        """Return all experts.

        Each has a range of channels of the experts' batch norm and convolution, and of the batch norm after them.
        """
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
            # The batch norm after the convolution is included, because it maps zeros to a constant other than zero.
            output = {
                key: rows[key] for key in ("moe.conv.weight", "moe.conv.bias", "norm.weight", "norm.bias")
            }
            found.append(Expert("moe", e, rows, output, self.moe.conv, rows["moe.conv.weight"]))
        return found

    def mask_expert(self, expert: Expert) -> None:
        """Mute the expert. The routing of the others does not change, since experts select patches independently."""
        mute(self, [expert])
