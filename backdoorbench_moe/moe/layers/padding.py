"""Positions of a sequence that hold no token, because the sequence is shorter than others in its batch.

A network of a library passes nothing but tokens from layer to layer. A model whose sequences are padded therefore
calls its network inside `ignored`, and MoE layers below ask `ignored_positions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ignored: ContextVar[Tensor | None] = ContextVar("ignored", default=None)


@contextmanager
def ignored(padding: Tensor) -> Iterator[None]:
    """Inside the block, let sparse layers leave padding out of the routing they report and of their balance loss.

    Padding is computed like other tokens. In a network whose attention is causal, padding on the right has no effect
    on the tokens before it.

    Args:
        padding: (B, N) bool, True where a position holds no token. Every sequence has the same N tokens in all layers.
    """
    token = _ignored.set(padding)
    try:
        yield
    finally:
        _ignored.reset(token)


def ignored_positions() -> Tensor | None:
    """Return the padding (B, N) of the batch that is being computed; None if it has none."""
    return _ignored.get()
