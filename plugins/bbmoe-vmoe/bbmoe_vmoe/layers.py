"""Layers of experts in the place of a transformer block's MLP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.moe.routed import Routing
from bbmoe_vmoe.dispatch import combine, dispatch, spread
from bbmoe_vmoe.experts import Experts
from bbmoe_vmoe.precision import full_precision
from bbmoe_vmoe.routers import Router
from bbmoe_vmoe.tap import Tap

_collected: ContextVar[list[Routing] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[list[Routing]]:
    """Give the list that the layers which run inside the block, in this thread, add their routing to.

    timm's blocks hand nothing but tokens from layer to layer; this takes the routing past them.
    """
    found: list[Routing] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


class MoELayer(nn.Module):
    """A router, E experts, and what the experts give (`tap`).

    name: the layer's in its model. prefix: so many tokens before the patches, which are routed like these, but are
    left out of the routing that is returned.
    """

    router: nn.Module

    def __init__(self, experts: Experts, *, name: str, prefix: int) -> None:
        super().__init__()
        self.name, self.prefix = name, prefix
        self.experts, self.tap = experts, Tap()

    @abstractmethod
    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Tokens (B, N, D) to the same shape, and the routing of the patches."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape; the routing goes to whoever is `collecting`."""
        outputs, routing = self.route(tokens)
        if (found := _collected.get()) is not None:
            found.append(routing)
        return outputs


class SparseLayer(MoELayer):
    """Every token's output is the weighted sum of the few experts' it was sent to; 0 where it was sent to none.

    The tap gives (B, E, N, D): what each expert adds to each token. That table is made only if somebody watches.
    """

    def __init__(self, experts: Experts, router: Router, *, name: str, prefix: int) -> None:
        super().__init__(experts, name=name, prefix=prefix)
        self.router = router

    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Choose, dispatch, combine."""
        choice = self.router(tokens)
        flat, assignment = tokens.flatten(0, 1), choice.assignment
        outputs = dispatch(flat, assignment, self.experts)
        if self.tap.watched:
            table = spread(outputs, assignment, len(flat), len(self.experts))
            table = self.tap(table.unflatten(1, tokens.shape[:2]).transpose(0, 1))
            # One expert after the other, as `combine` adds, so that watching changes no bit.
            total = torch.zeros_like(table[:, 0])
            for heard, given in zip(self.experts.heard, table.unbind(1), strict=True):
                total = total + heard * given
            mixed = total.to(outputs.dtype)
        else:
            mixed = combine(outputs, assignment, self.experts.heard, len(flat)).view(tokens.shape)
        gates, selected = (t[:, self.prefix :].transpose(1, 2) for t in (choice.gates, choice.selected))
        return mixed, Routing(self.name, gates, selected, choice.loss)


class SoftRouter(nn.Module):
    """Weights of N tokens for E x s slots: inner products of both, brought to length 1, times a learned scale.

    `masked` (E,) marks experts whose slots no token listens to any more.
    """

    masked: Tensor

    def __init__(self, features: int, num_experts: int, slots: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_experts * slots, features) * features**-0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("masked", torch.zeros(num_experts, dtype=torch.bool))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to dispatch and combine weights (B, N, E, s) float32.

        Dispatch sums to 1 over the tokens of an image, combine over all slots.
        """
        with full_precision(tokens.device):
            directions = self.scale.float() * F.normalize(self.slots.float(), dim=-1)
            logits = F.linear(F.normalize(tokens.float(), dim=-1), directions)
            logits = logits.unflatten(-1, (len(self.masked), -1))
            audible = logits.masked_fill(self.masked.unsqueeze(1), torch.finfo(logits.dtype).min)
            return logits.softmax(1), audible.flatten(2).softmax(-1).view_as(logits)


class SoftLayer(MoELayer):
    """Soft MoE: every slot is a mixture of an image's tokens, every token's output a mixture of the slots' outputs.

    As routing, an expert's gates are its dispatch weights summed over its slots, as shares of what the patches of
    the image get: they sum to 1 over these. Selected are the patches of more than an even share, 1 / P. The tap
    gives (B, E, s, D): what each expert makes of its slots. Source: Puigcerver et al., ICLR 2024, §2.
    """

    router: SoftRouter

    def __init__(self, experts: Experts, router: SoftRouter, *, name: str, prefix: int) -> None:
        super().__init__(experts, name=name, prefix=prefix)
        self.router = router

    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Mix tokens into slots, and slots into tokens."""
        given, taken = self.router(tokens)
        kind = tokens.dtype
        slots = torch.einsum("bnes,bnd->ebsd", given.to(kind), tokens)
        outputs = self.experts(slots.flatten(1, 2)).unflatten(1, slots.shape[1:3])
        outputs = self.tap(outputs.transpose(0, 1))
        taken = taken * self.experts.heard.view(-1, 1)
        mixed = torch.einsum("bnes,besd->bnd", taken.to(outputs.dtype), outputs)
        gates = given[:, self.prefix :].sum(-1)
        gates = gates / gates.sum(1, keepdim=True)
        selected = (gates > 1 / gates.shape[1]) & ~self.router.masked
        return mixed, Routing(self.name, gates.transpose(1, 2), selected.transpose(1, 2))
