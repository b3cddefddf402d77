"""Greedy decoding with cached keys and values."""

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
    """Continue texts by greedy decoding with transformers' `generate`.

    Args:
        network: A causal language model, in evaluation mode.
        tokens: (B, T) int64, padded on the right.
        lengths: (B,) int64, number of tokens of each text without padding, 1 to T.
        new_tokens: Number of tokens to generate, at least 1.
        end: The token that ends an answer.

    Returns:
        (B, new_tokens) int64. After the end of an answer, all tokens are `end`.

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
    """Convert right-padded texts to left-padded texts, which all end at the last position.

    Args:
        tokens: (B, T), padded on the right.
        lengths: (B,) int64, number of tokens of each text without padding.
        longest: The largest length, L.

    Returns:
        The texts, (B, L), with arbitrary tokens as padding; and the attention mask, (B, L) int64, 1 for tokens and 0
        for padding.
    """
    places = torch.arange(longest, device=tokens.device) - (longest - lengths.unsqueeze(1))
    return tokens.gather(1, places.clamp(min=0)), (places >= 0).long()
