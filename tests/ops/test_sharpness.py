"""The shift that raises a loss most, on problems worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.ops.sharpness import steepest_shift


def test_a_step_on_a_quadratic_by_hand() -> None:
    """L = (a^2 + 4 b^2) / 2 at (1, 1/2): the gradient is (1, 2), the shift in a ball of sqrt(5) too, and a step of 0.1
    against the gradient (2, 10) at (2, 5/2) leads to (0.8, -0.5)."""
    weights = torch.tensor([1.0, 0.5], requires_grad=True)
    curvature = torch.tensor([1.0, 4.0])
    [gradient] = torch.autograd.grad((curvature * weights**2).sum() / 2, weights)
    [shift] = steepest_shift([weights], [gradient], rho=5**0.5, adaptive=False)
    assert shift.tolist() == pytest.approx([1, 2])
    [sharp] = torch.autograd.grad((curvature * (weights + shift) ** 2).sum() / 2, weights)
    assert sharp.tolist() == pytest.approx([2, 10])
    assert (weights - 0.1 * sharp).tolist() == pytest.approx([0.8, -0.5])


def test_the_adaptive_shift_by_hand_over_two_tensors() -> None:
    """w = (2; -1), g = (3; 4): w g = (6, -4) has the norm sqrt(52), so the shift is 2 (12; 4) / sqrt(52)."""
    weights = [torch.tensor([2.0]), torch.tensor([[-1.0]])]
    shifts = steepest_shift(weights, [torch.tensor([3.0]), torch.tensor([[4.0]])], rho=2.0, adaptive=True)
    assert [shift.item() for shift in shifts] == pytest.approx([24 / 52**0.5, 8 / 52**0.5])
    assert [shift.shape for shift in shifts] == [(1,), (1, 1)]


@pytest.mark.parametrize("rho", [2.0, 10.0])
@pytest.mark.parametrize("gradient", [0.0, 1e-25])
def test_without_a_gradient_or_with_one_whose_norm_is_zero_nothing_is_shifted(rho, gradient) -> None:
    """10 over the smallest number is infinite, and 1e-25 over it is 1e13. The square of 1e-25 is 0."""
    weights = [torch.ones(2), torch.ones(3)]
    for adaptive in (False, True):
        given = [torch.full((2,), gradient), None]
        shifts = steepest_shift(weights, given, rho=rho, adaptive=adaptive)
        assert all(torch.equal(shift, torch.zeros_like(shift)) for shift in shifts)


VALUES = st.lists(st.floats(0.1, 10), min_size=3, max_size=3)


@settings(deadline=None)
@given(VALUES, VALUES, st.floats(0.1, 10), st.floats(0.01, 5))
def test_the_shift_lies_on_the_ball_and_does_not_depend_on_the_scale_of_a_layer(w, g, scale, rho) -> None:
    """Scaled weights have gradients scaled back; their adaptive shift is scaled as the weights are."""
    weights, gradients = torch.tensor(w).double(), torch.tensor(g).double() * torch.tensor([1, -1, 1])
    [plain] = steepest_shift([weights], [gradients], rho=rho, adaptive=False)
    [shift] = steepest_shift([weights], [gradients], rho=rho, adaptive=True)
    assert plain.norm().item() == pytest.approx(rho)
    assert (shift / weights).norm().item() == pytest.approx(rho)
    [other] = steepest_shift([weights * scale], [gradients / scale], rho=rho, adaptive=True)
    torch.testing.assert_close(other, shift * scale)
    # No other shift in the ball raises the loss more, to first order.
    rival = weights * torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5]).double(), dim=0) * rho
    assert (gradients * shift).sum() >= (gradients * rival).sum() - 1e-9
