"""Three tokens and three experts, of which routers are worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers import LinearRouter, RouterOutput

# Logits are the logarithms of these, so that a softmax is a row divided by its sum. The sums are 7, 10 and 8.
ODDS = torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 6.0], [2.0, 5.0, 1.0]])
GATES = torch.tensor([[4 / 7, 2 / 7, 1 / 7], [0.1, 0.3, 0.6], [2 / 8, 5 / 8, 1 / 8]])
# Over the common denominator 280, the columns of GATES sum to 258, 339 and 243. Their means:
MEAN_GATES = (86 / 280, 113 / 280, 81 / 280)


def pass_through(router: LinearRouter) -> LinearRouter:
    """Set the weights so that the logits are the features of the token."""
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    return router


def table_of(routed: RouterOutput) -> Tensor:
    """The weights of the experts' outputs, (tokens, experts)."""
    pairs, table = routed.assignment, torch.zeros_like(routed.gates[0])
    return table.index_put((pairs.tokens, pairs.experts), pairs.weights)
