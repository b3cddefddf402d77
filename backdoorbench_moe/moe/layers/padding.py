"""Padding: positions of a sequence without a token, because the sequence is shorter than others in its batch.

The networks of a library only pass tokens from layer to layer. A model with padded sequences therefore calls its
network inside `ignored`, and the MoE layers in it call `ignored_positions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ignored: ContextVar[Tensor | None] = ContextVar("ignored", default=None)


@contextmanager
def ignored(padding: Tensor) -> Iterator[None]:
    """Exclude padding from the reported routing and the balance loss of sparse layers inside the block.

    Padding is processed like other tokens. In a network with causal attention, padding on the right does not affect
    the tokens before it.

    Args:
        padding: (B, N) bool, True for positions without a token. All layers must have the same N positions.
    """
    token = _ignored.set(padding)
    try:
        yield
    finally:
        _ignored.reset(token)


def ignored_positions() -> Tensor | None:
    """Return the padding (B, N) of the current batch, or None outside `ignored`."""
    return _ignored.get()
