"""Auxiliary losses that keep the experts of a token-choice router evenly loaded.

Source: importance and load: Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021, appendix A;
    balance: the code of Kim et al., "MoEvil", ACSAC 2025, after Fedus et al., "Switch Transformers", JMLR 2022, §2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_variation(values: Tensor) -> Tensor:
    """Return the squared coefficient of variation: population variance over squared mean.

    Args:
        values: Of any shape, such as (E,), one value for each expert.

    Returns:
        A scalar; 0 if all values are equal.
    """
    return values.var(correction=0) / values.mean().square()


def importance_loss(gates: Tensor) -> Tensor:
    """Return the squared variation of the experts' importance, which is the sum of their gates over all tokens.

    Args:
        gates: (S, E) softmax of the logits without noise, for S tokens.
    """
    return squared_variation(gates.sum(0))


def load_loss(logits: Tensor, noisy: Tensor, deviation: float, top_k: int) -> Tensor:
    """Return the squared variation of the experts' load, which is the expected number of tokens they receive.

    The probability that an expert receives a token is that of its logit being at least the `top_k`-th largest noisy
    logit if only its own noise is resampled. Unlike the number of tokens that an expert received, it has a gradient.

    Args:
        logits: (S, E) logits without noise, for S tokens.
        noisy: (S, E) the same logits with normal noise added.
        deviation: Standard deviation of the noise, above 0.
        top_k: Experts for each token.
    """
    threshold = noisy.topk(top_k, dim=-1).values[:, -1:]
    chances = torch.special.ndtr((logits - threshold) / deviation)
    return squared_variation(chances.sum(0))


def balance_loss(weights: Tensor, gates: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return E times the sum over the experts of mean weight times mean gate, where means are over all tokens.

    If the weights of each token sum to 1, the loss is 1 if the experts are used evenly, and up to E if all tokens use a
    single expert. In Switch Transformers, the first factor is the share of tokens that an expert receives, which has no
    gradient. Here it is the mean weight, and the gradient flows through both factors.

    Args:
        weights: (S, E) factors of the experts' outputs for S tokens; 0 for experts that are not chosen.
        gates: (S, E) softmax of the logits over all experts.
        counted: (S,) bool, the tokens to average over; None for all.

    Returns:
        A scalar; 0 if no token is counted.
    """
    if counted is None:
        return weights.shape[1] * (weights.mean(0) * gates.mean(0)).sum()
    # Products instead of indexing, so that no shape depends on the values of a tensor.
    share = counted.to(weights.dtype) / counted.sum().clamp(min=1)
    return weights.shape[1] * ((share @ weights) * (share @ gates)).sum()
