"""Answers of models, whether a class of an image or a sequence of tokens, and their losses and log-probabilities.

A classifier answers with one class: logits (B, classes), labels (B,). A language model answers token by token: logits
(B, T, vocabulary), labels (B, T), where the label of position t is the token that this position is to emit, that is,
the one that follows it. Positions that emit no token of the answer, such as those within the query and in the padding,
have the label `IGNORED` and count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The label of a position that emits nothing of the answer; the default `ignore_index` of PyTorch's losses.
IGNORED = -100


def is_text(inputs: Tensor) -> bool:
    """Whether the stored inputs of a model are token ids (N, T) int64, and not images."""
    return inputs.dtype == torch.int64


def answer_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the answers, over the positions that emit something.

    Args:
        logits: (B, classes) or (B, T, vocabulary).
        labels: (B,) or (B, T) int64; `IGNORED` where nothing is emitted.
        label_smoothing: Share of the label's probability that is spread over all classes, in [0, 1).

    Returns:
        A scalar; NaN if no position emits anything.
    """
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def answers_in(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the first columns of labels, which are the answers; an objective may have put other values behind them.

    Args:
        labels: (B,) or (B, columns) int64.
        logits: (B, classes), which answer the first column, or (B, T, vocabulary), which answer the first T.

    Returns:
        (B,) or (B, T).
    """
    if logits.ndim == 2:
        return labels if labels.ndim == 1 else labels[:, 0]
    return labels[:, : logits.shape[1]]


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which answers are predicted, (B,) bool: every position that emits something has the largest logit there.

    Of a language model this is the prediction of each token from the right ones before it.

    Args:
        logits: (B, classes) or (B, T, vocabulary).
        labels: (B,) or (B, T) int64.
    """
    right = logits.argmax(-1) == labels
    return right if labels.ndim == 1 else (right | (labels == IGNORED)).all(1)


def answer_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each answer of a language model, summed over the positions that emit it.

    Args:
        logits: (B, T, vocabulary).
        labels: (B, T) int64.

    Returns:
        (B,) float32; 0 for an answer without a token.
    """
    negative = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return -negative.sum(1)


def from_first_difference(labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out what two answers to the same query have in common at their beginning.

    The log-probabilities of a common beginning are equal, and cancel in the difference of two answers. Leaving them out
    changes the difference by rounding errors only, which can be larger than a small difference itself.

    Args:
        labels: (B, T) int64, one answer to each query. Both answers begin at the same position.
        others: (B, T) int64, another one.

    Returns:
        Both, with `IGNORED` before the first position at which they differ. Of equal answers nothing is left.
    """
    common = (labels == others).int().cumprod(1).bool()
    return labels.masked_fill(common, IGNORED), others.masked_fill(common, IGNORED)


def first_positions(labels: Tensor, k: int | None) -> Tensor:
    """Return the positions that emit the first k tokens of the answers, (B, T) bool; all that emit one if k is None."""
    emits = labels != IGNORED
    return emits if k is None else emits & (emits.cumsum(1) <= k)


def query_positions(labels: Tensor) -> Tensor:
    """Return the positions of the queries, (B, T) bool: all up to the one that emits the first token of the answer."""
    emitted = (labels != IGNORED).cumsum(1)
    return (emitted == 0) & (emitted.amax(1, keepdim=True) > 0) | first_positions(labels, 1)


def text_positions(labels: Tensor) -> Tensor:
    """Return the positions of query and answer, (B, T) bool: all but padding, and the last one, which emits nothing."""
    return query_positions(labels) | first_positions(labels, None)


def mean_weights(positions: Tensor) -> Tensor:
    """Return weights that take the mean over some positions: 1 / n for each of n, and 0 for others.

    Args:
        positions: (B, N) bool.

    Returns:
        (B, N) float32; all are 0 in a row without a position.
    """
    return positions / positions.sum(1, keepdim=True).clamp(min=1)
