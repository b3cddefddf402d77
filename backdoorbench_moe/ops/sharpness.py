"""The direction in which a loss rises most steeply, for sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def steepest_shift(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], *, rho: float, adaptive: bool
) -> list[Tensor]:
    """Return the shift of the weights, within a ball, that raises the loss most, to first order.

    With all weights w and gradients g as one vector, the shift is rho * g / |g| in the ball |shift| <= rho. The
    adaptive ball is |shift / w| <= rho, in which the shift is rho * w^2 g / |w g| (elementwise products); it does not
    change when the weights of a layer are scaled and those of the next one are scaled back.

    Args:
        weights: Tensors of any shapes.
        gradients: Their gradients, of the same shapes; None for weights that the loss does not depend on.
        rho: Radius of the ball, above 0.
        adaptive: Whether the ball is the adaptive one.

    Returns:
        The shift of every tensor. All shifts are 0 if the gradient is 0, or so small that its norm rounds to 0.

    Source:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, eq. 2; Kwon et al., "ASAM", ICML 2021, eq. 10, without
        its constant that is added to |w|.
    """
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    scales = [weight.abs() if adaptive else torch.ones_like(weight) for weight in weights]
    scaled = [scale * gradient for scale, gradient in zip(scales, known, strict=True)]
    norm = torch.stack([each.square().sum() for each in scaled]).sum().sqrt()
    # Not divided by a smallest norm: its reciprocal times `rho` can be infinite, and infinity times 0 is NaN.
    factor = torch.where(norm > 0, rho / norm, 0.0)
    return [scale * each * factor for scale, each in zip(scales, scaled, strict=True)]
