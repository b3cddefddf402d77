"""Generation, compared with a loop over texts and tokens without a cache."""

from __future__ import annotations

import pytest
import torch
from bbmoe_lm.models.generation import pad_left
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.moe.structure import Generates


def plain(model, text, new_tokens, end):
    """Return the greedy continuation up to the end token, filled up with `end`."""
    found = []
    for _ in range(new_tokens):
        found.append(int(model(text[None])[0, -1].argmax()))
        text = torch.cat([text, torch.tensor(found[-1:])])
        if found[-1] == end:
            break
    return found + [end] * (new_tokens - len(found))


@pytest.mark.parametrize("kind", ["llama", "mixture"])
@torch.no_grad()
def test_as_a_plain_loop(lm, kind):
    model, (tokens, lengths) = getattr(lm, kind)(), lm.texts()
    assert isinstance(model, Generates)
    free = [plain(model, text[:n], 9, -1) for text, n in zip(tokens, lengths, strict=True)]
    # A token that ends one of the answers early, but not all.
    end = next(t for t in free[0][1:-1] if any(t not in row for row in free))
    want = [plain(model, text[:n], 9, end) for text, n in zip(tokens, lengths, strict=True)]
    assert end in want[0][:-1] and len({row.index(end) if end in row else 9 for row in want}) > 1
    assert model.generate(tokens, lengths, 9, end).tolist() == want


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(lm):
    model, (tokens, lengths) = lm.mixture(), lm.texts()
    other = tokens.masked_fill(torch.arange(10) >= lengths.unsqueeze(1), 9)
    assert torch.equal(model.generate(tokens, lengths, 5, 1), model.generate(other, lengths, 5, 1))


@torch.no_grad()
def test_all_answers_that_end_at_once(lm):
    model, (tokens, lengths) = lm.llama(), lm.texts()
    first = model.generate(tokens[:1], lengths[:1], 1, 1).item()
    assert model.generate(tokens[:1], lengths[:1], 4, first).tolist() == [[first] * 4]


def test_no_texts_and_wrong_lengths(lm):
    model, (tokens, lengths) = lm.llama(), lm.texts()
    assert model.generate(tokens[:0], lengths[:0], 3, 1).shape == (0, 3)
    for wrong in (lengths * 0, lengths + 1, lengths[:2]):
        with pytest.raises(ShapeError, match=r"^lengths: expected 5 numbers in 1..10, got"):
            model.generate(tokens, wrong, 3, 1)
    with pytest.raises(ShapeError, match=r"^new_tokens: expected at least 1, got 0"):
        model.generate(tokens, lengths, 0, 1)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_padding_is_moved_to_the_left(lengths):
    tokens = torch.arange(1, 1 + 7 * len(lengths)).view(-1, 7)
    texts, mask = pad_left(tokens, torch.tensor(lengths), max(lengths))
    for text, row, kept, n in zip(tokens, texts, mask, lengths, strict=True):
        assert row[len(row) - n :].tolist() == text[:n].tolist()
        assert kept.tolist() == [0] * (len(row) - n) + [1] * n
