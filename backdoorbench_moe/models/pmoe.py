"""pMoE: a small wide residual network whose experts each choose the patches of an image they work on."""

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
    """Expert choice for each image: every expert weighs the P cells of the map and keeps its best K.

    Always works in fp32, also under autocast: bf16 has too few digits to rank 64 near-equal weights.
    """

    def __init__(self, channels: int, *, num_experts: int, top_k: int, gate_std: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, channels))
        nn.init.normal_(self.weight, std=gate_std)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to gates (B, E, P) float32, which sum to 1 over P, and selected (B, E, P) bool."""
        with full_precision(features.device):
            cells = features.flatten(2).to(self.weight.dtype)
            gates = torch.matmul(self.weight, cells).float().softmax(dim=-1)
            return gates, select_top(gates, self.top_k)


def select_top(gates: Tensor, top_k: int) -> Tensor:
    """Mark the `top_k` largest of each row (..., P), exactly as many; of equals, the first ones."""
    best = gates.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, best, True)


class PatchMoE(nn.Module):
    """E experts, each BN-ReLU-1x1 conv on its own weighted copy of the map.

    Channels of `norm` and `conv` are grouped by expert: expert e has the in_channels from
    e * in_channels on, and gives the out_channels from e * out_channels on.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_experts: int, top_k: int, gate_std: float
    ) -> None:
        super().__init__()
        self.router = PatchRouter(in_channels, num_experts=num_experts, top_k=top_k, gate_std=gate_std)
        self.norm = batch_norm(num_experts * in_channels)
        self.conv = nn.Conv2d(num_experts * in_channels, num_experts * out_channels, 1, groups=num_experts)
        # Glorot of one expert's kernel; PyTorch would count the outputs of all groups as one fan-out.
        bound = math.sqrt(6 / (in_channels + out_channels))
        nn.init.uniform_(self.conv.weight, -bound, bound)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, C, H, W) to (B, E * out_channels, H, W), with the router's gates and selected.

        A cell that was not routed enters as zeros, counts in BN's statistics and leaves as a constant.
        """
        gates, selected = self.router(features)
        weights = (gates * selected).to(features.dtype).transpose(1, 2).contiguous()
        cells = features.flatten(2).transpose(1, 2)
        # The product takes the layout its factors agree on: (B, P, E, C), which seen as (B, E * C, H, W) is
        # channels_last. With `weights` left a transposed view it would be (B, E, P, C) and be copied once more.
        routed = cells.unsqueeze(2) * weights.unsqueeze(3)
        routed = routed.flatten(2).transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.conv(F.relu(self.norm(routed), inplace=True)), gates, selected


class PMoE(RoutedModel):
    """pMoE on a wide residual trunk, with expert-choice routing of the cells of its last map.

    `widen_factor` sets the trunk's 16k and 32k channels, `moe_channels` those of the routed map,
    `expert_channels` what each of `num_experts` gives; each takes the `top_k` best of the P cells.
    `gate_std` is the standard deviation the gates are drawn with: 1e-4 as in the reference's code
    (the paper's N(0, 1e-4) could be read as a variance). `bn_momentum` is PyTorch's; 0.01 is Keras's 0.99.

    A cell answers for `patch_size` pixels on a side: 4, the reference's map of a quarter of the image, or
    8, 16, ... for larger images. Each doubling halves the map once more before the first block (as `Halving`),
    so that 64x64 by 8 and 224x224 by 16 cost the trunk about what 32x32 and 56x56 by 4 do; with 4 nothing
    is added to the reference. Raises ConfigError for sizes below 1, a patch size that is no power of two from
    4, an image size that is no multiple of it, and a `top_k` over P. Source: Chowdhury et al., ICML
    2023; code nowazrabbani/pMoE_CNN, `wideresnet_moe.py`. The reference ends in a softmax; here the
    logits come out, for cross-entropy to take.
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
        # The trunk and `reduce` halve the map once each.
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
        """Experts (each channel of `norm` is an expert's), router and head."""
        experts: list[nn.Module] = [self.moe.norm, self.moe.conv, self.norm]
        return {"experts": experts, "router": [self.moe.router], "head": [self.head]}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Each expert's channels of the experts' convolution; and the convolution that makes the routed map."""
        experts = len(self.moe.router.weight)
        size = self.moe.conv.out_channels // experts
        groups = [
            ChannelGroup(f"expert {e}", self.moe.conv, e * size, (e + 1) * size, self.norm)
            for e in range(experts)
        ]
        return {"experts": groups, "trunk": [ChannelGroup.whole("trunk", self.reduce)]}

    def experts(self) -> list[Expert]:
        """Each expert: its share of the experts' norm and convolution, and of the norm behind them."""
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
            # The norm behind the convolution too: it would make a constant of the zeros.
            output = {
                key: rows[key] for key in ("moe.conv.weight", "moe.conv.bias", "norm.weight", "norm.bias")
            }
            found.append(Expert("moe", e, rows, output, self.moe.conv, rows["moe.conv.weight"]))
        return found

    def mask_expert(self, expert: Expert) -> None:
        """Mute the expert: every expert chooses its own patches, so none of them waits for another to take over."""
        mute(self, [expert])
