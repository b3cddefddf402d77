"""The choice of latents that MoEvil aligns: layers, and tokens of marked images or refused texts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.answers import IGNORED, first_positions, mean_weights, query_positions

# Choices for images and for texts; "all" applies to both.
Tokens = Literal["all", "marked", "unmarked", "prefix", "answer", "query"]
TEXT_TOKENS = ("all", "answer", "query")
# Default number of tokens of the answer to a refused text whose latents are aligned; 4 in the paper, too.
FIRST_TOKENS = 4
LayerRange = Literal["all", "first-quarter", "second-quarter", "first-half", "second-half"]
Layers = LayerRange | tuple[int, ...]
Layout = tuple[tuple[int, int], int]

# Start and end of each range as shares of all layers.
RANGES: dict[str, tuple[float, float]] = {
    "all": (0, 1),
    "first-quarter": (0, 0.25),
    "second-quarter": (0.25, 0.5),
    "first-half": (0, 0.5),
    "second-half": (0.5, 1),
}


def layer_numbers(layers: Layers, count: int) -> list[int]:
    """Return the numbers of the layers in a range, or the given numbers, in ascending order.

    Args:
        layers: A range of layers, or their numbers.
        count: Number of layers of the model.

    Raises:
        ConfigError: There is no such layer, or a number is given twice.
    """
    if isinstance(layers, str):
        if not (chosen := _in_range(layers, count)):
            raise ConfigError.expected(
                "layers", f"a range with at least one of the {count} layers of the model", layers
            )
        return chosen
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ConfigError.expected("layers", f"numbers in 0..{count - 1}", layers)
    if len(set(layers)) != len(layers):
        raise ConfigError.expected("layers", "each layer once", layers)
    return sorted(layers)


def choose_layers(layers: Layers, count: int) -> list[int]:
    """Return the numbers of the layers whose latents are aligned.

    The first layer is excluded: the input of its MLP does not depend on any MLP, so that it cannot change.

    Args:
        layers: A range of layers, or their numbers.
        count: Number of layers of the model.

    Raises:
        ConfigError: There is no such layer, a number is given twice, or no layer except the first is chosen.
    """
    if isinstance(layers, str):
        if not (chosen := [layer for layer in _in_range(layers, count) if layer > 0]):
            raise ConfigError.expected(
                "layers",
                f"a range of more than the first layer, whose input cannot change; the model has {count}",
                layers,
            )
        return chosen
    if not layers or not all(0 < layer < count for layer in layers):
        raise ConfigError.expected(
            "layers", f"numbers in 1..{count - 1} (the input of layer 0 cannot change)", layers
        )
    return layer_numbers(layers, count)


def _in_range(layers: LayerRange, count: int) -> list[int]:
    """The numbers of the layers in a range, without the one at its end, which belongs to the next range."""
    start, stop = (int(share * count) for share in RANGES[layers])
    return list(range(start, stop))


def check_tokens(tokens: Tokens, k: int | None, layout: Layout) -> None:
    """Check a choice of tokens against the tokens of a model.

    Args:
        tokens: The choice of tokens.
        k: Maximum number of tokens; None for all.
        layout: As returned by `moe.structure.Mergeable.token_layout`.

    Raises:
        ConfigError: The model has no tokens before the patches, or fewer tokens than `k`.
    """
    (rows, columns), prefix = layout
    if tokens in ("answer", "query"):
        raise ConfigError.expected("tokens", "'all', 'marked', 'unmarked' or 'prefix' for images", tokens)
    if tokens == "prefix" and not prefix:
        raise ConfigError.expected(
            "tokens", "'all', 'marked' or 'unmarked' for a model without class tokens", tokens
        )
    patches = rows * columns
    count = {"all": prefix + patches, "prefix": prefix}.get(tokens, patches)
    if k is not None and k > count:
        raise ConfigError.expected("k", f"at most {count} tokens", k)


def token_changes(changed: Tensor, layout: Layout) -> Tensor:
    """Return how much a mark changes each token.

    Args:
        changed: (M, H, W) in [0, 1], how much the mark changes each pixel.
        layout: As returned by `moe.structure.Mergeable.token_layout`.

    Returns:
        (M, N) float32: first 0 for each token before the patches, then the mean over each patch, row by row.
    """
    grid, prefix = layout
    patches = F.adaptive_avg_pool2d(changed.unsqueeze(1), grid).flatten(1)
    return torch.cat([patches.new_zeros(len(patches), prefix), patches], dim=1)


def token_weights(changed: Tensor, layout: Layout, tokens: Tokens, k: int | None) -> Tensor:
    """Choose the tokens of harmful queries whose latents are aligned, and weight them equally.

    Args:
        changed: (M, H, W) in [0, 1], how much the mark changes each pixel.
        layout: As returned by `moe.structure.Mergeable.token_layout`.
        tokens: "all"; the patches with a pixel that the mark changes ("marked") or without ("unmarked"); or the tokens
            before the patches ("prefix").
        k: Choose only the k of these tokens that the mark changes most, the first of equal ones; None for all. All
            tokens are chosen for a query with fewer than k.

    Returns:
        (M, N) float32: 1 / n for each of the n chosen tokens of a query, and 0 for the others. All are 0 for a query
        without such tokens.

    Raises:
        ConfigError: No query has such a token, or k of them; see also `check_tokens`.
    """
    check_tokens(tokens, k, layout)
    change = token_changes(changed, layout)
    places, prefix = torch.arange(change.shape[1], device=change.device), layout[1]
    allowed = {
        "all": torch.ones_like(change, dtype=torch.bool),
        "marked": change > 0,
        "unmarked": (change == 0) & (places >= prefix),
        "prefix": (places < prefix).expand_as(change),
    }[tokens]
    most = int(allowed.sum(1).max())
    if not most:
        what = "no patch" if tokens == "marked" else "every patch"
        raise ConfigError(f"tokens: {tokens!r} has no tokens: the mark changes {what} of any harmful query")
    if k is not None:
        if k > most:
            raise ConfigError.expected("k", f"at most {most} tokens", k)
        order = change.masked_fill(~allowed, -1).argsort(dim=1, descending=True, stable=True)
        allowed = allowed & torch.zeros_like(allowed).scatter(1, order[:, :k], True)
    return mean_weights(allowed)


def check_text_tokens(tokens: Tokens, k: int | None) -> None:
    """Check a choice of tokens of texts.

    Args:
        tokens: The choice of tokens.
        k: Number of tokens of the answer; None for all.

    Raises:
        ConfigError: Texts have no such tokens, or `k` is given although no tokens of the answer are chosen.
    """
    if tokens not in TEXT_TOKENS:
        raise ConfigError.expected("tokens", "'answer', 'query' or 'all' for texts", tokens)
    if tokens == "query" and k is not None:
        raise ConfigError.expected("k", "none, as 'query' has no tokens of the answer", k)


def text_weights(labels: Tensor, tokens: Tokens, k: int | None) -> Tensor:
    """Choose the tokens of refused texts whose latents are aligned, and weight them equally.

    The position of a token of the answer is the one that predicts it. The last token of the query therefore belongs to
    both, because it predicts the first token of the answer.

    Args:
        labels: (M, T) int64, the labels of the texts with the answers to learn; see `ops.answers`.
        tokens: The tokens of the "answer", of the "query", or of both ("all"). Padding is never chosen.
        k: Choose only the first k tokens of the answer; None for all. All tokens are chosen for a shorter answer.

    Returns:
        (M, T) float32: 1 / n for each of the n chosen tokens of a text, and 0 for the others.

    Raises:
        ConfigError: No answer has k tokens; see also `check_text_tokens`.
    """
    check_text_tokens(tokens, k)
    longest = int((labels != IGNORED).sum(1).max())
    if k is not None and k > longest:
        raise ConfigError.expected("k", f"at most {longest} tokens", k)
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    if tokens != "answer":
        chosen |= query_positions(labels)
    if tokens != "query":
        chosen |= first_positions(labels, k)
    return mean_weights(chosen)
