"""Greedy generation of answers by language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.inference import classes_of, forward
from backdoorbench_moe.moe.structure import Generates
from backdoorbench_moe.ops.answers import query_positions
from backdoorbench_moe.ops.images import Split, batch_size_for


@torch.inference_mode()
def answer(
    model: nn.Module, queries: Split, new_tokens: int, *, end: int, padding: int, precision: str
) -> Tensor:
    """Generate the answers of a model to queries, in evaluation mode.

    Args:
        model: The model. If it is not a `Generates`, which has its own method, every token takes a forward pass over
            the complete text.
        queries: Queries with answers, tokens and labels (N, T); the model does not see the answers.
        new_tokens: Number of tokens to generate for each query, from 1.
        end: The token that ends an answer; tokens after it do not matter.
        padding: The token that pads short queries.
        precision: "fp32" or "bf16".

    Returns:
        The generated tokens, (N, new_tokens) int64 on the CPU.
    """
    model.eval()
    asked = query_positions(queries.labels)
    tokens, lengths = queries.images.masked_fill(~asked, padding), asked.sum(1)
    size = batch_size_for(tokens)
    found = []
    for some, own in zip(tokens.split(size), lengths.split(size), strict=True):
        some = some[:, : int(own.max())]
        if isinstance(model, Generates):
            with autocast(some.device, precision):
                found.append(model.generate(some, own, new_tokens, end).cpu())
        else:
            found.append(_greedy(model, some, own, new_tokens, end, padding, precision).cpu())
    return torch.cat(found)


def _greedy(
    model: nn.Module, tokens: Tensor, lengths: Tensor, new_tokens: int, end: int, padding: int, precision: str
) -> Tensor:
    """Continue texts token by token; see `Generates.generate`. The end token is followed by padding."""
    rows = torch.arange(len(tokens), device=tokens.device)
    text = torch.nn.functional.pad(tokens, (0, new_tokens), value=padding)
    answers = torch.full((len(tokens), new_tokens), padding, device=tokens.device)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(new_tokens):
        last = lengths + step
        logits = forward(model, text[:, : int(last.max())], precision=precision)[rows, last - 1]
        found = classes_of(logits).masked_fill(ended, padding)
        answers[:, step] = text[rows, last] = found
        ended |= found == end
        if ended.all():
            break
    return answers
