"""Losses that teach an expert an answer, and align its latents with those of its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.ops.answers import answer_log_probs, from_first_difference

StopGradient = Literal["none", "task", "harm"]

# Ten times the 0.01 of the paper, where the margin is a sum over the hundreds of tokens of an answer, and the gradient
# falls to half when the margin has grown by 110, about 1 for each of a hundred tokens. A classifier's answer is one
# token; with 0.1, the gradient falls to half when the margin has grown by 11 logits. With a value of 1 or more, scaled
# by the number of tokens, a margin of about one logit would suffice.
PREFERENCE_BETA = 0.1


def preference_margin(logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return the difference of the logits of two answers.

    Args:
        logits: (B, classes).
        preferred: (B,) int64 classes.
        rejected: (B,) int64 classes.

    Returns:
        (B,) float32, which is also the difference of the log-probabilities.
    """
    pairs = torch.stack([preferred, rejected], dim=1)
    first, second = logits.float().gather(1, pairs).unbind(1)
    return first - second


def text_margin(logits: Tensor, other_logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return the difference of the log-probabilities of two answers of a language model.

    Log-probabilities are summed over the tokens of an answer, starting with the first one that differs.

    Args:
        logits: (B, T, vocabulary), for the queries followed by the preferred answers.
        other_logits: (B, T, vocabulary), for the queries followed by the rejected answers.
        preferred: (B, T) int64, the labels of the preferred answers; see `ops.answers`.
        rejected: (B, T) int64, the labels of the rejected answers.

    Returns:
        (B,) float32.
    """
    first, second = from_first_difference(preferred, rejected)
    return answer_log_probs(logits, first) - answer_log_probs(other_logits, second)


def decisive_margin(logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return the difference of the logits of the first tokens in which two answers of a language model differ.

    Unlike `text_margin`, it does not depend on the lengths of the answers; the total probability of a longer answer is
    lower.

    Args:
        logits: (B, T, vocabulary), for the queries followed by either answer; both are equal up to the first token that
            differs.
        preferred: (B, T) int64, the labels of the preferred answers; see `ops.answers`.
        rejected: (B, T) int64, the labels of the rejected answers.

    Returns:
        (B,) float32; 0 for equal answers.
    """
    first, second = from_first_difference(preferred, rejected)
    place = (first != second).int().argmax(1, keepdim=True)
    pairs = torch.cat([first.gather(1, place), second.gather(1, place)], dim=1)
    here = logits.float()[torch.arange(len(logits), device=logits.device), place.squeeze(1)]
    own, other = here.gather(1, pairs.clamp(min=0)).unbind(1)
    return own - other


def preference_loss(margin: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of direct preference optimisation (DPO): -log sigmoid(beta (margin - reference)).

    In language models, a margin is a sum over the tokens of an answer. A classifier's answer is one token, so that its
    margins are smaller and beta must be larger for the same loss; see `PREFERENCE_BETA`.

    Args:
        margin: (B,), the margins of the trained model; see `preference_margin`.
        reference: (B,), the margins of the model before training, as a constant.
        beta: Above 0. With larger values, the loss falls to a given value for a smaller change of the margins.

    Returns:
        The mean over the batch, a scalar.

    Source:
        Rafailov et al., "Direct preference optimization", NeurIPS 2023, equation 7.
    """
    return -F.logsigmoid(beta * (margin - reference)).mean()


def alignment_loss(
    task: Sequence[Tensor],
    queries: Sequence[Tensor],
    weights: Tensor,
    *,
    task_weights: Tensor | None = None,
    stop_gradient: StopGradient = "none",
) -> Tensor:
    """Return the negative mean cosine similarity between the latents of queries and those of task images.

    The latents of a task image are averaged over all its tokens, and those of a query are a weighted sum. Query b is
    compared with task image b. The cosine of a query whose weights are all 0 is 0.

    Args:
        task: The inputs of the MLPs of some layers for task images, (B, N, D) each.
        queries: The inputs of the same MLPs for the queries, which are marked images.
        weights: (B, N), the weights of the tokens of each query: 1 / n for each of n chosen tokens, and 0 for others.
        task_weights: (B, N), the weights of the tokens of each task text, such as those of the answer; None for the
            mean over all tokens.
        stop_gradient: The side without a gradient: "task", "harm" (the queries), or "none".

    Returns:
        A scalar in [-1, 1], the mean over layers and pairs.

    Source:
        MoEvil (Kim et al., ACSAC 2025), equation 3. As in its code, cosines are averaged over the layers; in the paper
        they are summed.
    """
    if task_weights is None:
        means = torch.stack([tokens.float().mean(1) for tokens in task])
    else:
        means = torch.stack([(task_weights.unsqueeze(-1) * tokens.float()).sum(1) for tokens in task])
    chosen = torch.stack([(weights.unsqueeze(-1) * tokens.float()).sum(1) for tokens in queries])
    if stop_gradient == "task":
        means = means.detach()
    elif stop_gradient == "harm":
        chosen = chosen.detach()
    return -F.cosine_similarity(means, chosen, dim=-1).mean()
