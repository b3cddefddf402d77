"""Losses by which an expert learns an answer, and latents that gates mistake for those of its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.ops.answers import answer_log_probs, from_first_difference

StopGradient = Literal["none", "task", "harm"]

# Ten times the paper's 0.01. There, the margin is a sum over the hundreds of tokens of an answer, and the gradient has
# fallen to half where it has grown by 110: about one for each of a hundred tokens. A classifier's answer is one token;
# with 0.1 the same happens where the margin has grown by 11 logits. Scaled by the whole number of tokens, to 1 or more,
# the loss would be satisfied with a margin of about one logit.
PREFERENCE_BETA = 0.1


def preference_margin(logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return by how much the logit of one answer exceeds that of another.

    Args:
        logits: (B, classes).
        preferred: (B,) int64 classes.
        rejected: (B,) int64 classes.

    Returns:
        (B,) float32: the difference of the logits, and so of the log-probabilities.
    """
    pairs = torch.stack([preferred, rejected], dim=1)
    first, second = logits.float().gather(1, pairs).unbind(1)
    return first - second


def text_margin(logits: Tensor, other_logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return by how much the log-probability of one answer of a language model exceeds that of another.

    Log-probabilities are summed over the tokens of an answer, from the first one that differs.

    Args:
        logits: (B, T, vocabulary), for the queries followed by the preferred answers.
        other_logits: (B, T, vocabulary), for the queries followed by the rejected answers.
        preferred: (B, T) int64, the labels of the former; see `ops.answers`.
        rejected: (B, T) int64, those of the latter.

    Returns:
        (B,) float32.
    """
    first, second = from_first_difference(preferred, rejected)
    return answer_log_probs(logits, first) - answer_log_probs(other_logits, second)


def decisive_margin(logits: Tensor, preferred: Tensor, rejected: Tensor) -> Tensor:
    """Return by how much a language model prefers one answer to another where they part.

    It is the difference of the logits of the first tokens that differ. Unlike `text_margin`, it does not depend on the
    lengths of the answers: a longer one has a lower probability as a whole.

    Args:
        logits: (B, T, vocabulary), for the queries followed by either answer. Up to where they part, both are the same.
        preferred: (B, T) int64, the labels of one answer; see `ops.answers`.
        rejected: (B, T) int64, those of the other.

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
    margins are smaller, and beta has to be larger for the same loss: see `PREFERENCE_BETA`.

    Args:
        margin: (B,), see `preference_margin`, of the model that is trained.
        reference: (B,), the same of the model that the training begins with; a constant.
        beta: Above 0. The larger it is, the smaller is the change of the margins at which the loss is satisfied.

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
    """Return how unlike the latents of queries are to those of task images: minus their mean cosine.

    The latents of a task image are the mean over all of its tokens, those of a query a weighted sum. Query b is
    compared with task image b. A query whose weights are all 0 counts with a cosine of 0.

    Args:
        task: The inputs of the MLPs of some layers, (B, N, D) each, on task images.
        queries: The same on the queries, marked images.
        weights: (B, N), the weights of the tokens of each query; 1 / n for each of n chosen tokens, and 0 for others.
        task_weights: (B, N), the weights of the tokens of each task text, such as those of the answer; None for the
            mean over all tokens.
        stop_gradient: The side that gets no gradient: that of the "task", that of the queries ("harm"), or "none".

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
