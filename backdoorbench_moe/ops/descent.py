"""Optimising pixels within bounds: descent along the sign of the gradient, and with Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def signed_descent(
    loss: Callable[[Tensor, Batch], Tensor],
    start: Tensor,
    batches: Iterable[Batch],
    *,
    step: float,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """Minimise a loss by projected gradient descent along the sign of the gradient (PGD).

    Args:
        loss: Function of the values and of a batch, which returns a scalar.
        start: The values to start from, float; they are not changed.
        batches: One batch for each step.
        step: Length of a step.
        low: Lower bound of the values.
        high: Upper bound of the values.

    Returns:
        The values after the last step, within the bounds.

    Source:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, §2.1.
    """
    values = _clamp(start.detach(), low, high)
    for batch in batches:
        values = values.detach().requires_grad_()
        [gradient] = torch.autograd.grad(loss(values, batch), values)
        values = _clamp(values.detach() - step * gradient.sign(), low, high)
    return values.detach()


def adam_descent(
    loss: Callable[[Tensor, Batch], Tensor],
    start: Tensor,
    batches: Iterable[Batch],
    *,
    lr: float,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """Minimise a loss with Adam; after each step the values are clamped to the bounds.

    Args:
        loss: Function of the values and of a batch, which returns a scalar.
        start: The values to start from, float; they are not changed.
        batches: One batch for each step.
        lr: Learning rate.
        low: Lower bound of the values.
        high: Upper bound of the values.

    Returns:
        The values after the last step, within the bounds.
    """
    values = _clamp(start.detach().clone(), low, high).requires_grad_()
    adam = torch.optim.Adam([values], lr=lr)
    for batch in batches:
        adam.zero_grad()
        loss(values, batch).backward()
        adam.step()
        with torch.no_grad():
            values.copy_(_clamp(values, low, high))
    return values.detach()


def _clamp(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return values.clamp(torch.as_tensor(low).to(values), torch.as_tensor(high).to(values))
