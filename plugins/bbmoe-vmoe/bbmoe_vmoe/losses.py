"""What keeps the experts of a token-choice router evenly loaded. Source: Riquelme et al., appendix A."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of (E,) values: population variance over squared mean."""
    return values.var(correction=0) / values.mean().square()


def importance_loss(gates: Tensor) -> Tensor:
    """Squared variation of the experts' summed gates (S, E), which are taken without noise."""
    return squared_variation(gates.sum(0))


def load_loss(logits: Tensor, noisy: Tensor, deviation: float, top_k: int) -> Tensor:
    """Squared variation of the chances, summed over S tokens, that an expert is among the `top_k`.

    logits, noisy: (S, E), the second with normal noise of this standard deviation. An expert's chance is the one
    to reach the `top_k`-th largest noisy logit if its own noise were drawn once more. Unlike the number of tokens
    an expert gets, it has a gradient.
    """
    threshold = noisy.topk(top_k, dim=-1).values[:, -1:]
    chances = torch.special.ndtr((logits - threshold) / deviation)
    return squared_variation(chances.sum(0))
