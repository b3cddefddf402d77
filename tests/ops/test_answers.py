"""Answers as labels: which positions emit them, and their losses and log-probabilities, by hand and in properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from backdoorbench_moe.ops.answers import (
    IGNORED,
    answer_log_probs,
    answer_loss,
    answers_in,
    first_positions,
    from_first_difference,
    mean_weights,
    query_positions,
    right_answers,
)

X = IGNORED
# A query of three tokens and an answer of two with its end; a query of one token and an answer of one with its end. The
# last token of a query emits the first one of the answer. Two positions, and four, are padding.
LABELS = torch.tensor([[X, X, 5, 6, 1, X, X], [7, 1, X, X, X, X, X]])


def test_the_positions_that_emit_an_answer_and_its_first_tokens() -> None:
    whole = [[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert first_positions(LABELS, None).int().tolist() == whole
    assert first_positions(LABELS, 1).int().tolist() == [[0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert first_positions(LABELS, 2).int().tolist() == [[0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert first_positions(LABELS, 9).int().tolist() == whole, "a shorter answer has what it has"


def test_the_positions_of_a_query_end_with_the_one_that_emits_the_first_token() -> None:
    assert query_positions(LABELS).int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    nothing = torch.full((1, 3), X)
    assert not query_positions(nothing).any() and not first_positions(nothing, None).any()


def test_weights_are_a_mean_over_the_positions() -> None:
    weights = mean_weights(first_positions(LABELS, None))
    third = pytest.approx(1 / 3)
    assert weights.tolist() == [[0, 0, third, third, third, 0, 0], [0.5, 0.5, 0, 0, 0, 0, 0]]
    assert mean_weights(torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0, 0]]


def halves(*rows: list[int], vocabulary: int = 4) -> torch.Tensor:
    """Logits (rows, T, vocabulary) that give the named token of each position one half, and the others a sixth."""
    logits = torch.full((len(rows), len(rows[0]), vocabulary), math.log(1 / 6))
    return logits.scatter(2, torch.tensor(rows).unsqueeze(2), math.log(1 / 2))


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens_and_not_over_padding() -> None:
    """Two tokens: the first is named and has 1/2, the second is not and has 1/6."""
    labels = torch.tensor([[X, 2, 3, X], [X, X, 0, X]])
    logits = halves([1, 2, 2, 0], [0, 0, 0, 0])
    found = answer_log_probs(logits, labels)
    assert found.tolist() == pytest.approx([math.log(1 / 2 * 1 / 6), math.log(1 / 2)])
    logits[:, 3] = 1e4 * torch.randn(2, 4)
    assert torch.equal(answer_log_probs(logits, labels), found)
    # The loss is minus the mean over the three tokens of the batch.
    assert answer_loss(logits, labels).item() == pytest.approx(-found.sum().item() / 3)


def test_what_two_answers_have_in_common_at_their_beginning_is_left_out() -> None:
    """They differ at the second token; the third is the same again, and counts, as it follows another token."""
    one, other = torch.tensor([[X, 2, 3, 1, X]]), torch.tensor([[X, 2, 0, 1, 1]])
    first, second = from_first_difference(one, other)
    assert first.tolist() == [[X, X, 3, 1, X]] and second.tolist() == [[X, X, 0, 1, 1]]
    assert all((each == X).all() for each in from_first_difference(one, one))


def test_an_answer_is_right_if_every_token_is() -> None:
    labels = torch.tensor([[X, 2, 3, X], [X, 2, 3, X], [X, 2, X, X]])
    logits = halves([0, 2, 3, 1], [0, 2, 1, 1], [0, 2, 1, 1])
    assert right_answers(logits, labels).tolist() == [True, False, True]


@pytest.mark.parametrize("extra", [0, 1])
def test_columns_behind_the_answers_are_not_part_of_them(extra) -> None:
    labels = torch.arange(2 * (3 + extra)).view(2, 3 + extra)
    assert torch.equal(answers_in(labels, torch.zeros(2, 3, 9)), labels[:, :3])
    assert torch.equal(answers_in(labels, torch.zeros(2, 9)), labels[:, 0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), smoothing=st.sampled_from([0.0, 0.1]))
def test_of_classes_everything_is_as_in_pytorch(seed, smoothing) -> None:
    draws = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(6, 5, generator=draws), torch.randint(5, (6,), generator=draws)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(answer_loss(logits, labels, label_smoothing=smoothing), expected)
    assert torch.equal(right_answers(logits, labels), logits.argmax(1) == labels)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), more=st.integers(1, 3))
def test_more_padding_changes_nothing(seed, more) -> None:
    """The log-probabilities, the loss, and whether an answer is right."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7 + more, 8, generator=draws)
    longer = F.pad(LABELS, (0, more), value=X)
    for function in (answer_log_probs, answer_loss, right_answers):
        torch.testing.assert_close(function(logits, longer), function(logits[:, :7], LABELS))
    assert torch.equal(query_positions(longer)[:, :7], query_positions(LABELS))
