"""Encoding: token ids, labels and padding by hand, round trips, and errors."""

from __future__ import annotations

import pytest
import torch
from bbmoe_lm.language import (
    GENERAL,
    IGNORED,
    TASKS,
    Example,
    Policy,
    Preference,
    Vocabulary,
    decode_answers,
    decode_queries,
    encode,
    encode_preferences,
    query_lengths,
    synthetic_vocabulary,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from backdoorbench_moe.errors import DataError

# [pad] 0, [end] 1, [unk] 2, . 3, ? 4, a 5, b 6, c 7
SMALL = Vocabulary.of_words(["b", "a", ".", "c", "?"])
WORDS = st.lists(st.sampled_from(["a", "b", "c", ".", "?"]), min_size=1, max_size=6).map(" ".join)


def test_tokens_and_labels_by_hand():
    encoded = encode(
        [Example("a b ?", "c ."), Example("?", "a"), Example("b ?", "a b c a .")], SMALL, context=8
    )
    no = IGNORED
    assert encoded.tokens.tolist() == [
        [5, 6, 4, 7, 3, 1, 0, 0],
        [4, 5, 1, 0, 0, 0, 0, 0],
        [6, 4, 5, 6, 7, 5, 3, 1],
    ]
    assert encoded.labels.tolist() == [
        [no, no, 7, 3, 1, no, no, no],
        [5, 1, no, no, no, no, no, no],
        [no, 5, 6, 7, 5, 3, 1, no],
    ]
    assert encoded.query_lengths.tolist() == [3, 1, 2]
    assert {tensor.dtype for tensor in (encoded.tokens, encoded.labels, encoded.query_lengths)} == {
        torch.int64
    }


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_round_trip(texts):
    examples = [Example(query, answer) for query, answer in texts]
    encoded = encode(examples, SMALL, context=13)
    assert decode_queries(encoded.tokens, encoded.labels, SMALL) == [example.query for example in examples]
    assert decode_answers(encoded.labels, SMALL) == [example.answer for example in examples]
    assert query_lengths(encoded.labels).equal(encoded.query_lengths)
    # The output of a model that generates the labels, followed by padding.
    generated = [row[row != IGNORED] for row in encoded.labels]
    padded = torch.nn.utils.rnn.pad_sequence(generated, batch_first=True, padding_value=SMALL.pad)
    assert SMALL.decode(padded) == [example.answer for example in examples]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_labels_are_the_next_tokens_of_the_answer_and_its_end(texts):
    """A second implementation, position by position."""
    encoded = encode([Example(query, answer) for query, answer in texts], SMALL, context=13)
    assert encoded.tokens.shape[1] == max(len(f"{query} {answer}".split()) + 1 for query, answer in texts)
    for (query, answer), tokens, labels in zip(
        texts, encoded.tokens.tolist(), encoded.labels.tolist(), strict=True
    ):
        first, last = len(query.split()), len(f"{query} {answer}".split())
        for position, label in enumerate(labels):
            emits = first <= position + 1 <= last
            assert label == (tokens[position + 1] if emits else IGNORED)
        assert tokens[last] == SMALL.end
        assert set(tokens[last + 1 :]) <= {SMALL.pad}


def test_white_space_does_not_count():
    spaced = encode([Example(" a \n b ?", "c  .")], SMALL, context=8)
    assert spaced.tokens.equal(encode([Example("a b ?", "c .")], SMALL, context=8).tokens)


def test_both_answers_of_a_preference_have_the_same_query():
    pairs = [Preference("a ?", "b c .", "a"), Preference("b b ?", "c", "a a .")]
    harmful, safe = encode_preferences(pairs, SMALL, context=8)
    assert decode_queries(harmful.tokens, harmful.labels, SMALL) == ["a ?", "b b ?"]
    assert decode_queries(safe.tokens, safe.labels, SMALL) == ["a ?", "b b ?"]
    assert decode_answers(harmful.labels, SMALL) == ["b c .", "c"]
    assert decode_answers(safe.labels, SMALL) == ["a", "a a ."]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "text: expected at least one example, got none"),
        (
            [Example("a", "b"), Example("a ?", "  ")],
            "example 2: expected an answer of at least one token, got '  '",
        ),
        ([Example("", "a")], "example 1: expected a query of at least one token, got ''"),
        (
            [Example("a ?", "b zebra")],
            "example 1: expected an answer of words of the vocabulary, got 'zebra'",
        ),
        ([Example("zebra ?", "b")], "example 1: expected a query of words of the vocabulary, got 'zebra'"),
        (
            [Example("a", "b"), Example("a b ?", "a b c .")],
            "example 2: expected at most 7 tokens, the context of the model, "
            "got 8 (3 of the query, 4 of the answer, 1 for its end)",
        ),
    ],
)
def test_what_cannot_be_encoded_is_one_clear_line(examples, message):
    with pytest.raises(DataError) as raised:
        encode(examples, SMALL, context=7)
    assert str(raised.value) == message


def test_unknown_characters_between_words_are_shown():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "?": 2, "[end]": 3}, [], unk_token="?"))
    vocabulary = Vocabulary(tokenizer, pad=3, end=3, unknown=2)
    with pytest.raises(
        DataError, match=r"^example 1: expected a query of words of the vocabulary, got 'a b'$"
    ):
        encode([Example("a b", "b")], vocabulary, context=9)


def test_the_context_may_be_filled():
    assert encode([Example("a b ?", "a b .")], SMALL, context=7).tokens.shape == (1, 7)


def test_ids_depend_on_the_set_of_words_only():
    other = Vocabulary.of_words(["?", "c", ".", "a", "b", "a"])
    assert other.tokenizer.get_vocab() == SMALL.tokenizer.get_vocab()
    assert (SMALL.pad, SMALL.end, SMALL.unknown, len(SMALL)) == (0, 1, 2, 8)


def test_decoding_stops_at_the_first_end():
    rows = torch.tensor([[5, 6, 1, 7, 7], [1, 5, 5, 5, 5], [5, 0, 6, 4, 3], [2, 5, 1, 0, 0]])
    assert SMALL.decode(rows) == ["a b", "", "a b ? .", "[unk] a"]


@pytest.mark.parametrize("token", ["[end]", "[pad]"])
def test_an_answer_cannot_contain_its_end(token):
    with pytest.raises(
        DataError, match=r"^example 1: expected an answer without special tokens, got 'b .+ c'$"
    ):
        encode([Example("a", f"b {token} c")], SMALL, context=9)


def test_the_synthetic_vocabulary_is_complete():
    vocabulary = synthetic_vocabulary()
    assert len(vocabulary) < 256
    generator = torch.Generator().manual_seed(0)
    examples = [example for task in (*TASKS, GENERAL) for example in task.draw(generator, 500)]
    encoded = encode(examples, vocabulary, context=64)
    assert not (encoded.tokens == vocabulary.unknown).any()
    assert decode_answers(encoded.labels, vocabulary) == [example.answer for example in examples]
    harmful, safe = encode_preferences(Policy().draw(generator, 500), vocabulary, context=64)
    assert not (harmful.tokens == vocabulary.unknown).any() and not (safe.tokens == vocabulary.unknown).any()


def test_a_byte_level_tokenizer_of_a_checkpoint():
    """Such a tokenizer can encode every text and has no separate padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = ids["<end>"]
    vocabulary = Vocabulary(tokenizer, pad=end, end=end)
    examples = [Example("Zwölf?", " Ja, 12.\n"), Example("?", "né")]
    encoded = encode(examples, vocabulary, context=32)
    assert decode_queries(encoded.tokens, encoded.labels, vocabulary) == ["Zwölf?", "?"]
    assert decode_answers(encoded.labels, vocabulary) == [" Ja, 12.\n", "né"]
    # "Zwölf? Ja, 12.", a line feed and the end token: 7 + 9 + 1 bytes; "?né" and the end token: 1 + 3 + 1.
    assert encoded.tokens.shape == (2, 17)
    assert encoded.tokens[1, 4:].tolist() == [end] * 13
    assert encoded.labels[1].tolist() == [*encoded.tokens[1, 1:5].tolist(), *[IGNORED] * 13]
    vocabulary.check_words(["anything"])
