"""Greedy continuation of texts, with the keys and values of earlier positions kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_moe.errors import ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def continue_greedily(
    network: PreTrainedModel, tokens: Tensor, lengths: Tensor, *, new_tokens: int, end: int
) -> Tensor:
    """Continue texts with the most probable token, and so on, as transformers' `generate` does.

    Args:
        network: A causal language model, in evaluation mode.
        tokens: (B, T) int64, padded on the right.
        lengths: (B,) int64, number of tokens of each that are not padding, 1 to T.
        new_tokens: Number of tokens to add, at least 1.
        end: The token with which an answer ends.

    Returns:
        (B, new_tokens) int64. Behind the end of an answer there is only `end`.

    Raises:
        ShapeError: A length is not in 1..T, or `new_tokens` is below 1.
    """
    if new_tokens < 1:
        raise ShapeError(f"new_tokens: expected at least 1, got {new_tokens}")
    if not len(tokens):
        return tokens.new_zeros(0, new_tokens)
    shortest, longest = (int(bound) for bound in lengths.aminmax())
    if lengths.shape != (len(tokens),) or shortest < 1 or longest > tokens.shape[1]:
        raise ShapeError(
            f"lengths: expected {len(tokens)} numbers in 1..{tokens.shape[1]}, got {lengths.tolist()}"
        )
    texts, mask = pad_left(tokens, lengths, longest)
    found: Any = network.generate(  # type: ignore[operator]
        texts, attention_mask=mask, generation_config=_greedy(new_tokens, end)
    )
    added = found[:, longest:]
    return F.pad(added, (0, new_tokens - added.shape[1]), value=end)


def _greedy(new_tokens: int, end: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )


def pad_left(tokens: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Move texts that are padded on the right to the right, so that all of them end at the last position.

    Args:
        tokens: (B, T), padded on the right.
        lengths: (B,) int64, number of tokens of each that are not padding.
        longest: The largest of them, L.

    Returns:
        The texts, (B, L), where padding is any token of the text; and (B, L) int64, 1 for tokens and 0 for padding.
    """
    places = torch.arange(longest, device=tokens.device) - (longest - lengths.unsqueeze(1))
    return tokens.gather(1, places.clamp(min=0)), (places >= 0).long()
