"""The hypergradient of a quadratic problem, whose closed form is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.ops.hypergradient import fixed_point_hypergradient

STEP = 0.3
# Inner loss d'Ad/2 - d'Bw, with the solution d = A^-1 B w. Outer loss |d - c|^2 / 2 + e'w.
A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.5, 0.2], [0.0, 0.2, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 0.7]], dtype=torch.float64)
C = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
E = torch.tensor([0.1, -0.4], dtype=torch.float64)
W = torch.tensor([0.8, -0.6], dtype=torch.float64)


def hypergradient(steps: int) -> Tensor:
    """As the function computes it, from automatic derivatives of the losses."""
    weights = W.clone().requires_grad_()
    solution = torch.linalg.solve(A, B @ W).requires_grad_()
    outer = (solution - C).square().sum() / 2 + E @ weights
    inner = solution @ A @ solution / 2 - solution @ B @ weights
    [descent] = torch.autograd.grad(inner, solution, create_graph=True)
    [found] = fixed_point_hypergradient(outer, solution - STEP * descent, solution, [weights], steps=steps)
    return found


def test_many_steps_give_the_derivative_through_the_solution() -> None:
    """d/dw of |A^-1 B w - c|^2 / 2 + e'w is B' A^-1 (A^-1 B w - c) + e."""
    inverse = torch.linalg.inv(A)
    exact = B.T @ inverse @ (inverse @ B @ W - C) + E
    torch.testing.assert_close(hypergradient(200), exact)
    assert not torch.allclose(hypergradient(5), exact, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_give_as_many_terms_of_the_neumann_series(steps) -> None:
    residual = torch.linalg.solve(A, B @ W) - C
    carry = torch.eye(3, dtype=torch.float64) - STEP * A
    vector = sum(torch.linalg.matrix_power(carry, k) @ residual for k in range(steps))
    torch.testing.assert_close(hypergradient(steps), STEP * B.T @ vector + E)


def test_weights_without_influence_get_zeros_and_others_their_direct_part() -> None:
    solution = torch.ones(2, requires_grad=True)
    direct, none = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    mapped = (solution**2).clone()
    found = fixed_point_hypergradient(direct.sum() * 3, mapped, solution, [direct, none], steps=4)
    assert [each.tolist() for each in found] == [[3, 3], [0, 0, 0]]
