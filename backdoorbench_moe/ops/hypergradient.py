"""The gradient of a loss through the solution of an inner problem, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fixed_point_hypergradient(
    outer: Tensor, mapped: Tensor, solution: Tensor, weights: Sequence[Tensor], *, steps: int
) -> list[Tensor]:
    """Return the gradient of an outer loss E(d(w), w) with respect to w, where d(w) is the fixed point of a map.

    The map is F(d, w), such as a step of gradient descent on an inner loss: its fixed point d = F(d, w) is the solution
    of the inner problem. The gradient is dE/dw + (dF/dw)^T v, where v solves v = (dF/dd)^T v + dE/dd. The solution is
    approximated by iterating this equation from v = 0, which converges if the map is a contraction. After K steps, v is
    the sum of the first K terms of the Neumann series.

    Args:
        outer: E, a scalar that depends on `solution` and `weights`.
        mapped: F(solution, weights), with the shape of `solution`; if it contains a gradient, computed with
            `create_graph=True`.
        solution: d, a tensor that requires gradients.
        weights: w, tensors that require gradients.
        steps: Number K of steps, from 1.

    Returns:
        The gradient with respect to each of the weights; zeros for weights without influence.

    Source:
        Grazzi et al., "On the iteration complexity of hypergradient computation", ICML 2020, algorithm 2.
    """
    into, *direct = torch.autograd.grad(outer, [solution, *weights], allow_unused=True)
    start = torch.zeros_like(solution) if into is None else into
    vector = start
    for _ in range(steps - 1):
        [carried] = torch.autograd.grad(mapped, solution, vector, retain_graph=True)
        vector = start + carried
    indirect = torch.autograd.grad(mapped, weights, vector, allow_unused=True)
    return [_sum(weight, *parts) for weight, *parts in zip(weights, direct, indirect, strict=True)]


def _sum(weight: Tensor, *parts: Tensor | None) -> Tensor:
    """Return the sum of the gradients that are not None; zeros if there are none."""
    known = [part for part in parts if part is not None]
    return torch.stack(known).sum(0) if known else torch.zeros_like(weight)
