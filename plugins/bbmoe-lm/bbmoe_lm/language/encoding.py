"""Examples as tensors of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.ops.answers import IGNORED, query_positions
from bbmoe_lm.language.examples import Example, Preference
from bbmoe_lm.language.vocabulary import Vocabulary


@dataclass(frozen=True)
class EncodedText:
    """N examples of up to T tokens.

    Args:
        tokens: (N, T) int64: query, answer, end token, padding.
        labels: (N, T) int64: the next token. `labels[n, t]` is `tokens[n, t + 1]` if that is a token of the answer or
            the end token after it, and -100 elsewhere.
        query_lengths: (N,) int64, at least 1: the first label of row n is at `query_lengths[n] - 1`.
    """

    tokens: Tensor
    labels: Tensor
    query_lengths: Tensor


def encode(examples: Sequence[Example], vocabulary: Vocabulary, context: int) -> EncodedText:
    """Encode examples, padded on the right to the length of the longest.

    Args:
        examples: At least one.
        vocabulary: The tokenizer. Query and answer are tokenized separately, so the query's tokens do not depend on the
            answer.
        context: Maximum number of tokens of query, answer and end token together.

    Raises:
        DataError: There are no examples; or an example has an empty query or answer, a word that is not in the
            vocabulary, the end or padding token in its answer, or more tokens than the context. The message has the
            number of the example, from 1.
    """
    if not examples:
        raise DataError("text: expected at least one example, got none")
    queries = vocabulary.ids([example.query for example in examples])
    answers = vocabulary.ids([example.answer for example in examples])
    _check(examples, queries, answers, vocabulary, context)
    rows = [[*query, *answer, vocabulary.end] for query, answer in zip(queries, answers, strict=True)]
    query_lengths = torch.tensor([len(query) for query in queries])
    lengths = torch.tensor([len(row) for row in rows])
    position = torch.arange(int(lengths.max()))
    tokens = torch.full((len(rows), len(position)), vocabulary.pad)
    tokens[position < lengths.unsqueeze(1)] = torch.tensor(list(chain.from_iterable(rows)))
    emits = (position >= query_lengths.unsqueeze(1) - 1) & (position < lengths.unsqueeze(1) - 1)
    # The last column never emits: rolling brings the first token there, which `where` replaces.
    labels = torch.where(emits, tokens.roll(-1, dims=1), IGNORED)
    return EncodedText(tokens, labels, query_lengths)


def encode_preferences(
    preferences: Sequence[Preference], vocabulary: Vocabulary, context: int
) -> tuple[EncodedText, EncodedText]:
    """Encode the queries with their harmful answers and with their safe answers; see `encode`."""
    harmful = [Example(pair.query, pair.harmful) for pair in preferences]
    safe = [Example(pair.query, pair.safe) for pair in preferences]
    return encode(harmful, vocabulary, context), encode(safe, vocabulary, context)


def query_lengths(labels: Tensor) -> Tensor:
    """Return the number of tokens of each query, (N,) int64, from labels (N, T) with an answer in each row."""
    return query_positions(labels).sum(1)


def decode_queries(tokens: Tensor, labels: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Return the queries of encoded examples as texts, from tokens and labels (N, T)."""
    lengths = query_lengths(labels).tolist()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return vocabulary.tokenizer.decode_batch(rows, skip_special_tokens=False)


def decode_answers(labels: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Return the answers of encoded examples as texts, from labels (N, T)."""
    rows = [[token for token in row if token != IGNORED][:-1] for row in labels.tolist()]
    return vocabulary.tokenizer.decode_batch(rows, skip_special_tokens=False)


def _check(
    examples: Sequence[Example],
    queries: list[list[int]],
    answers: list[list[int]],
    vocabulary: Vocabulary,
    context: int,
) -> None:
    """Raise DataError for the first example that cannot be encoded."""
    for place, (example, query, answer) in enumerate(zip(examples, queries, answers, strict=True), start=1):
        _check_part(example.query, query, vocabulary, f"example {place}: expected a query")
        _check_part(example.answer, answer, vocabulary, f"example {place}: expected an answer")
        if vocabulary.end in answer or vocabulary.pad in answer:
            raise DataError(
                f"example {place}: expected an answer without special tokens, got {example.answer!r}"
            )
        total = len(query) + len(answer) + 1
        if total > context:
            raise DataError(
                f"example {place}: expected at most {context} tokens, the context of the model, "
                f"got {total} ({len(query)} of the query, {len(answer)} of the answer, 1 for its end)"
            )


def _check_part(text: str, ids: list[int], vocabulary: Vocabulary, expected: str) -> None:
    """Raise DataError for a query or answer that is empty or has unknown words."""
    if not ids:
        raise DataError(f"{expected} of at least one token, got {text!r}")
    if vocabulary.unknown in ids:
        # All words may be known but not the characters between them.
        unknown = ", ".join(map(repr, vocabulary.unknown_words(text))) or repr(text)
        raise DataError(f"{expected} of words of the vocabulary, got {unknown}")
