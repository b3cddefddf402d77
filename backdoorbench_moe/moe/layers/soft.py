"""The layer of Soft MoE, whose experts process mixtures of tokens.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", ICLR 2024, §2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.moe.layers.base import MoELayer
from backdoorbench_moe.moe.layers.experts import Experts
from backdoorbench_moe.moe.precision import full_precision
from backdoorbench_moe.moe.routed import Routing


class SoftRouter(nn.Module):
    """Dispatch and combine weights of N tokens for E * s slots, s for each expert.

    Logits are inner products of tokens and slot parameters, both normalised to length 1, times a learned scale.

    Args:
        features: Features D of a token.
        num_experts: Number of experts E.
        slots: Slots s of each expert.

    Attributes:
        slots: (E * s, D) parameter.
        scale: (1,) parameter.
        masked: (E,) bool buffer. The slots of experts marked here have combine weight 0 for every token.
    """

    masked: Tensor

    def __init__(self, features: int, num_experts: int, slots: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_experts * slots, features) * features**-0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("masked", torch.zeros(num_experts, dtype=torch.bool))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the weights, in fp32 even under autocast.

        Args:
            tokens: (B, N, D).

        Returns:
            Dispatch weights (B, N, E, s), which sum to 1 over the N tokens of an image, and combine weights of the
            same shape, which sum to 1 over the slots of all experts that are not masked; both float32.
        """
        with full_precision(tokens.device):
            directions = self.scale.float() * F.normalize(self.slots.float(), dim=-1)
            logits = F.linear(F.normalize(tokens.float(), dim=-1), directions)
            logits = logits.unflatten(-1, (len(self.masked), -1))
            masked = self.masked.unsqueeze(1)
            allowed = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
            taken = allowed.flatten(2).softmax(-1).view_as(logits)
            # The softmax alone would be even if all experts are masked.
            return logits.softmax(1), taken.masked_fill(masked, 0)


class SoftMoELayer(MoELayer):
    """Each slot is a mixture of an image's tokens, and each token's output is a mixture of the outputs for the slots.

    Soft MoE does not select patches. In `Routing`, an expert's gates are its dispatch weights, summed over its slots
    and normalised to sum to 1 over the patches of the image; a patch counts as selected if its gate is above an even
    share, 1 / P. The tap passes the outputs for the slots, (B, E, s, D).

    Args:
        experts: The experts.
        router: The router, for the same number of experts.
        name: Dotted name of the layer in its model.
        num_prefix_tokens: Number of tokens before the patches.
    """

    router: SoftRouter

    def __init__(
        self, experts: Experts, router: SoftRouter, *, name: str, num_prefix_tokens: int = 0
    ) -> None:
        super().__init__(experts, name=name, num_prefix_tokens=num_prefix_tokens)
        self.router = router

    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Mix tokens into slots, and slot outputs into tokens; see `MoELayer.route`."""
        given, taken = self.router(tokens)
        dtype = tokens.dtype
        slots = torch.einsum("bnes,bnd->ebsd", given.to(dtype), tokens)
        outputs = self.experts(slots.flatten(1, 2)).unflatten(1, slots.shape[1:3])
        outputs = self.tap(outputs.transpose(0, 1))
        taken = taken * self.experts.heard.view(-1, 1)
        mixed = torch.einsum("bnes,besd->bnd", taken.to(outputs.dtype), outputs)
        gates = given[:, self.num_prefix_tokens :].sum(-1)
        # All dispatch weights of the patches can underflow to 0 if a class token has most of the weight.
        gates = gates / gates.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        selected = (gates > 1 / gates.shape[1]) & ~self.router.masked
        return mixed, Routing(self.name, gates.transpose(1, 2), selected.transpose(1, 2))
