"""Carrying tokens to their experts and the answers back."""

from __future__ import annotations

import torch
from torch import Tensor

from bbmoe_vmoe.experts import Experts
from bbmoe_vmoe.routers import Assignment

# Batched products over every expert's room compute at most so much more than the tokens need.
MOST_WASTE = 1.25
# Major compute capabilities with a kernel for grouped products: Hopper and Blackwell of data centers.
GROUPING = (9, 10)


def dispatch(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """What each pair's expert gives for its token: (S, D) to (T, D), in the way that suits device and room.

    On a GPU that has a kernel for it, in half precision, in grouped products. Otherwise, where the room is little more
    than the tokens need, in batched ones, whose shapes are always the same: on a CPU in bf16, where every new shape is
    compiled for, they train in two thirds of the time. Where there is room for all, expert by expert; but on a GPU,
    with gradients, batched again, since that waits for nothing: a training step may be captured as a CUDA graph. Expert
    by expert too where somebody watches the hidden units, since there every row is a token's.
    """
    if experts.hidden.watched:
        return by_expert(tokens, assignment, experts)
    on_gpu = tokens.device.type == "cuda"
    if on_gpu and _groups_are_fast(tokens, experts):
        return by_groups(tokens, assignment, experts)
    waste = assignment.capacity * len(experts) / len(assignment.tokens)
    if waste <= MOST_WASTE or (on_gpu and torch.is_grad_enabled()):
        return by_buffers(tokens, assignment, experts)
    return by_expert(tokens, assignment, experts)


def _groups_are_fast(tokens: Tensor, experts: Experts) -> bool:
    """Whether a GPU has a kernel for grouped products: in half precision, of widths in steps of 16 bytes.

    Elsewhere PyTorch reads the groups' ends back to the host, which a step that is captured may not.
    """
    halved = torch.is_autocast_enabled(tokens.device.type) or tokens.dtype in (torch.bfloat16, torch.float16)
    aligned = tokens.shape[1] % 8 == 0 and experts.width % 8 == 0
    return halved and aligned and torch.cuda.get_device_capability(tokens.device)[0] in GROUPING


def by_expert(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """One expert after the other, each on its own tokens."""
    return experts.each(tokens[assignment.tokens].split(assignment.counts.tolist()))


def by_groups(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """All experts in one grouped product a layer."""
    ends = assignment.counts.cumsum(0).to(torch.int32)
    return experts.grouped(tokens[assignment.tokens], ends, assignment.owners)


def by_buffers(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """All experts in one batched product, on (E, capacity, D) buffers; a pair without room gives anything finite."""
    starts = assignment.counts.cumsum(0) - assignment.counts
    places = torch.arange(assignment.capacity, device=tokens.device)
    rows = (starts.unsqueeze(1) + places).clamp(max=len(assignment.tokens) - 1)
    outputs = experts(tokens[assignment.tokens[rows]]).flatten(0, 1)
    own = torch.arange(len(assignment.tokens), device=tokens.device) - starts[assignment.owners]
    return outputs[assignment.owners * assignment.capacity + own.clamp(max=assignment.capacity - 1)]


def combine(outputs: Tensor, assignment: Assignment, heard: Tensor, tokens: int) -> Tensor:
    """Weighted sum of each token's answers: (T, D) to (S, D). heard: (E,), see `Experts`."""
    weights = assignment.weights * heard[assignment.owners]
    weighted = outputs * weights.unsqueeze(1)
    total = weighted.new_zeros(tokens, outputs.shape[1])
    return total.index_add(0, assignment.tokens, weighted).to(outputs.dtype)


def spread(outputs: Tensor, assignment: Assignment, tokens: int, experts: int) -> Tensor:
    """What every expert gives to every token, weighted: (T, D) to (E, S, D), zeros where it gives nothing."""
    weighted = outputs * assignment.weights.unsqueeze(1)
    table = weighted.new_zeros(experts * tokens, outputs.shape[1])
    return table.index_copy(0, assignment.owners * tokens + assignment.tokens, weighted).unflatten(
        0, (experts, tokens)
    )
