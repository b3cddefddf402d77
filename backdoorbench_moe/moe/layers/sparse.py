"""The sparse MoE layer, in which each token is processed only by the experts that the router selects."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers.assignment import Assignment
from backdoorbench_moe.moe.layers.base import MoELayer
from backdoorbench_moe.moe.layers.dispatching import combine, dispatch, scatter_outputs
from backdoorbench_moe.moe.layers.experts import Experts
from backdoorbench_moe.moe.layers.padding import ignored_positions
from backdoorbench_moe.moe.layers.routers import Router
from backdoorbench_moe.moe.routed import Routing


class SparseMoELayer(MoELayer):
    """Each token's output is the weighted sum of the outputs of its experts, or zeros for a token without an expert.

    In the reported routing, padding has gates of 0 and selects no expert (see `padding.ignored`).

    The tap passes the contribution of each expert to each token, (B, E, N, D). It is computed only while a hook is
    registered.

    Args:
        experts: The experts.
        router: Any sparse router for the same number of experts.
        name: Dotted name of the layer in its model.
        num_prefix_tokens: Number of tokens before the patches.
    """

    def __init__(self, experts: Experts, router: Router, *, name: str, num_prefix_tokens: int = 0) -> None:
        super().__init__(experts, name=name, num_prefix_tokens=num_prefix_tokens)
        self.router = router

    def route(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Route, dispatch and combine; see `MoELayer.route`."""
        routed = self.router(tokens)
        flat, assignment = tokens.flatten(0, 1), routed.assignment
        outputs = dispatch(flat, assignment, self.experts)
        if self.tap.watched:
            mixed = self._combine_watched(outputs, assignment, tokens.shape)
        else:
            mixed = combine(outputs, assignment, self.experts.heard, len(flat)).view(tokens.shape)
        gates, selected = routed.gates, routed.selected
        if (padding := ignored_positions()) is not None:
            gates, selected = (values.masked_fill(padding.unsqueeze(-1), 0) for values in (gates, selected))
        gates, selected = (
            values[:, self.num_prefix_tokens :].transpose(1, 2) for values in (gates, selected)
        )
        return mixed, Routing(self.name, gates, selected, routed.aux_loss)

    def _combine_watched(self, outputs: Tensor, assignment: Assignment, shape: torch.Size) -> Tensor:
        """`combine` through the tap."""
        images, tokens, _ = shape
        table = scatter_outputs(outputs, assignment, images * tokens, len(self.experts))
        table = self.tap(table.unflatten(1, (images, tokens)).transpose(0, 1))
        # Summed in the same order as in `combine`, so that a hook that only reads does not change any bit.
        total = torch.zeros_like(table[:, 0])
        for heard, given in zip(self.experts.heard, table.unbind(1), strict=True):
            total = total + heard * given
        return total.to(outputs.dtype)
