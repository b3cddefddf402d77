"""Which layers and tokens MoEvil aligns, by hand."""

from __future__ import annotations

import pytest
import torch

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.latents import (
    check_tokens,
    choose_layers,
    token_changes,
    token_weights,
)

# 4 x 4 pixels in 2 x 2 patches. The mark changes one pixel of the second patch by 0.8, two of the third by 0.4 in the
# first image, and all pixels of the last patch in the second.
CHANGED = torch.zeros(2, 4, 4)
CHANGED[0, 0, 3] = 0.8
CHANGED[0, 2, :2] = 0.4
CHANGED[1, 2:, 2:] = 1.0
PATCHES = ((2, 2), 0)
CLASS_TOKEN = ((2, 2), 1)


@pytest.mark.parametrize(
    ("layers", "count", "chosen"),
    [
        ("all", 4, [1, 2, 3]),
        ("all", 2, [1]),
        ("first-quarter", 8, [1]),
        ("second-quarter", 8, [2, 3]),
        ("second-quarter", 4, [1]),
        ("first-half", 7, [1, 2]),
        ("second-half", 7, [3, 4, 5, 6]),
        ("first-half", 4, [1]),
        ("second-half", 4, [2, 3]),
        # As in the paper: 28 layers.
        ("first-quarter", 28, [*range(1, 7)]),
        ("second-quarter", 28, [*range(7, 14)]),
        ("second-half", 28, [*range(14, 28)]),
        ((3, 1), 4, [1, 3]),
    ],
)
def test_layers(layers, count, chosen) -> None:
    assert choose_layers(layers, count) == chosen


@pytest.mark.parametrize(
    ("layers", "count", "message"),
    [
        (
            "first-quarter",
            4,
            r"a range of more than the first layer, whose input cannot change; the model has 4",
        ),
        ("all", 1, r"the model has 1, got 'all'"),
        ((0, 1), 4, r"numbers in 1\.\.3 \(the input of layer 0 cannot change\), got \(0, 1\)"),
        ((4,), 4, r"numbers in 1\.\.3"),
        ((), 4, r"numbers in 1\.\.3"),
        ((1, 1), 4, r"each layer once"),
    ],
)
def test_layers_that_there_are_not(layers, count, message) -> None:
    with pytest.raises(ConfigError, match=f"^layers: expected .*{message}"):
        choose_layers(layers, count)


def test_the_change_of_a_token_is_the_mean_over_its_patch() -> None:
    expected = torch.tensor([[0, 0.2, 0.2, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(token_changes(CHANGED, PATCHES), expected)
    with_class_token = torch.tensor([[0, 0, 0.2, 0.2, 0], [0, 0, 0, 0, 1]])
    torch.testing.assert_close(token_changes(CHANGED, CLASS_TOKEN), with_class_token)


@pytest.mark.parametrize(
    ("layout", "tokens", "k", "weights"),
    [
        (PATCHES, "all", None, [[1 / 4] * 4, [1 / 4] * 4]),
        (PATCHES, "marked", None, [[0, 1 / 2, 1 / 2, 0], [0, 0, 0, 1]]),
        (PATCHES, "unmarked", None, [[1 / 2, 0, 0, 1 / 2], [1 / 3, 1 / 3, 1 / 3, 0]]),
        # Of equal changes the first in the order of rows; then tokens without a change.
        (PATCHES, "all", 1, [[0, 1, 0, 0], [0, 0, 0, 1]]),
        (PATCHES, "all", 3, [[1 / 3, 1 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 0, 1 / 3]]),
        (PATCHES, "marked", 1, [[0, 1, 0, 0], [0, 0, 0, 1]]),
        # The second query has one marked token only.
        (PATCHES, "marked", 2, [[0, 1 / 2, 1 / 2, 0], [0, 0, 0, 1]]),
        (PATCHES, "unmarked", 1, [[1, 0, 0, 0], [1, 0, 0, 0]]),
        (CLASS_TOKEN, "all", None, [[1 / 5] * 5, [1 / 5] * 5]),
        (CLASS_TOKEN, "all", 1, [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]),
        (CLASS_TOKEN, "prefix", None, [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]),
        (CLASS_TOKEN, "unmarked", None, [[0, 1 / 2, 0, 0, 1 / 2], [0, 1 / 3, 1 / 3, 1 / 3, 0]]),
        (CLASS_TOKEN, "unmarked", 1, [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]),
    ],
)
def test_the_weights_of_the_tokens(layout, tokens, k, weights) -> None:
    torch.testing.assert_close(
        token_weights(CHANGED, layout, tokens, k), torch.tensor(weights, dtype=torch.float)
    )


def test_a_query_that_the_mark_does_not_change_has_no_marked_token() -> None:
    changed = torch.cat([CHANGED, torch.zeros(1, 4, 4)])
    assert token_weights(changed, PATCHES, "marked", None)[2].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("changed", "layout", "tokens", "k", "message"),
    [
        (CHANGED, PATCHES, "all", 5, "k: expected at most 4 tokens, got 5"),
        (CHANGED, CLASS_TOKEN, "all", 6, "k: expected at most 5 tokens, got 6"),
        (CHANGED, CLASS_TOKEN, "prefix", 2, "k: expected at most 1 tokens, got 2"),
        (CHANGED, PATCHES, "marked", 3, "k: expected at most 2 tokens, got 3"),
        (CHANGED, PATCHES, "prefix", None, "tokens: expected 'all', 'marked' or 'unmarked' .*, got 'prefix'"),
        (0 * CHANGED, PATCHES, "marked", None, "tokens: 'marked' has no tokens: the mark changes no patch"),
        (
            CHANGED + 1,
            PATCHES,
            "unmarked",
            None,
            "tokens: 'unmarked' has no tokens: the mark changes every patch",
        ),
    ],
)
def test_tokens_that_there_are_not(changed, layout, tokens, k, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        token_weights(changed, layout, tokens, k)


def test_what_the_model_alone_shows_is_found_without_queries() -> None:
    check_tokens("marked", 4, PATCHES)
    with pytest.raises(ConfigError, match="k: expected at most 4 tokens, got 5"):
        check_tokens("marked", 5, CLASS_TOKEN)
