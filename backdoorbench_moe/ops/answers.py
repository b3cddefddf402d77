"""Answers of models, a class of an image or a sequence of tokens, with losses and log-probabilities.

A classifier answers with one class: logits (B, classes), labels (B,). A language model answers token by token: logits
(B, T, vocabulary), labels (B, T), where the label of position t is the token that this position should emit, that is,
the next token. Positions that emit no token of the answer, such as those within the query and in the padding, have the
label `IGNORED` and are ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The label of a position that emits no token of the answer; the default `ignore_index` of PyTorch's losses.
IGNORED = -100


def is_text(inputs: Tensor) -> bool:
    """Return whether the stored inputs of a model are token ids (N, T) int64 instead of images."""
    return inputs.dtype == torch.int64


def answer_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the answers, over the positions that emit a token.

    Args:
        logits: (B, classes) or (B, T, vocabulary).
        labels: (B,) or (B, T) int64; `IGNORED` where no token is emitted.
        label_smoothing: Share of the target that is distributed equally over all classes, in [0, 1).

    Returns:
        A scalar; NaN if no position emits a token.
    """
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)


def answers_in(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the first columns of labels, which are the answers; further columns can belong to an objective.

    Args:
        labels: (B,) or (B, columns) int64.
        logits: (B, classes) for the first column, or (B, T, vocabulary) for the first T columns.

    Returns:
        (B,) or (B, T).
    """
    if logits.ndim == 2:
        return labels if labels.ndim == 1 else labels[:, 0]
    return labels[:, : logits.shape[1]]


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which answers are predicted correctly, (B,) bool: the label has the largest logit at every position.

    For a language model, each token is predicted from the correct previous ones (teacher forcing).

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
    """Mask the common prefix of two answers to the same query.

    The log-probabilities of a common prefix are equal, and cancel in the difference between two answers. Masking them
    avoids rounding errors, which can be larger than a small difference.

    Args:
        labels: (B, T) int64, one answer to each query. Both answers begin at the same position.
        others: (B, T) int64, another answer.

    Returns:
        Both, with `IGNORED` before the first position at which they differ. Equal answers are masked completely.
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
    """Return the positions of query and answer, (B, T) bool, without padding and the last one, which emits nothing."""
    return query_positions(labels) | first_positions(labels, None)


def mean_weights(positions: Tensor) -> Tensor:
    """Return weights for the mean over some positions: 1 / n for each of n positions, and 0 elsewhere.

    Args:
        positions: (B, N) bool.

    Returns:
        (B, N) float32; all are 0 in a row without a position.
    """
    return positions / positions.sum(1, keepdim=True).clamp(min=1)
