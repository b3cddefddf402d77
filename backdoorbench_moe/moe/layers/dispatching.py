"""Sending tokens to their experts and collecting the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.moe.layers.assignment import Assignment
from backdoorbench_moe.moe.layers.experts import Experts

# Batched products compute every expert at full capacity. They are used if this costs at most this multiple of the
# computation that the pairs need.
MAX_BATCHED_WORK = 1.25
# Major compute capabilities of GPUs with a kernel for grouped matrix products: Hopper and data-centre Blackwell.
GROUPED_MM_CAPABILITIES = (9, 10)


def dispatch(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """Compute the expert of every (token, expert) pair, by the fastest method for the device.

    - In half precision on a GPU with a kernel for grouped matrix products: grouped products.
    - If the capacities are only slightly larger than needed: batched matrix products. Their shapes are the same in
      every step, so that oneDNN need not compile for new ones on a CPU in bf16: a step takes two thirds of the time.
    - Otherwise, one expert after the other; but with gradients on a GPU, batched products, which never wait for the
      device, so that a training step can be captured as a CUDA graph.

    If a hook reads the hidden units, experts are computed one after the other, since then every row that is not
    padding belongs to a token.

    Args:
        tokens: (S, D) tokens of the batch.
        assignment: T pairs of a token and an expert.
        experts: The experts.

    Returns:
        (T, D) outputs without weights. Pairs that exceed the capacity may have arbitrary finite outputs.
    """
    if experts.hidden.watched or not len(assignment.tokens):
        return dispatch_each(tokens, assignment, experts)
    on_gpu = tokens.device.type == "cuda"
    if on_gpu and _has_grouped_kernel(tokens, experts):
        return dispatch_grouped(tokens, assignment, experts)
    work = assignment.capacity * len(experts) / len(assignment.tokens)
    if work <= MAX_BATCHED_WORK or (on_gpu and torch.is_grad_enabled()):
        return dispatch_batched(tokens, assignment, experts)
    return dispatch_each(tokens, assignment, experts)


def _has_grouped_kernel(tokens: Tensor, experts: Experts) -> bool:
    """Whether the GPU has a kernel for grouped products, which needs half precision and widths divisible by 8.

    Without the kernel, PyTorch reads the ends of the groups back to the host, which is not possible in a step that is
    captured as a CUDA graph.
    """
    halved = torch.is_autocast_enabled(tokens.device.type) or tokens.dtype in (torch.bfloat16, torch.float16)
    aligned = tokens.shape[1] % 8 == 0 and experts.hidden_features % 8 == 0
    return (
        halved and aligned and torch.cuda.get_device_capability(tokens.device)[0] in GROUPED_MM_CAPABILITIES
    )


def dispatch_each(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """`dispatch` with one expert computed after the other, each on the tokens sent to it."""
    return experts.forward_each(tokens[assignment.tokens].split(assignment.counts.tolist()))


def dispatch_grouped(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """`dispatch` with all experts computed in grouped matrix products."""
    ends = assignment.counts.cumsum(0).to(torch.int32)
    return experts.forward_grouped(tokens[assignment.tokens], ends, assignment.experts)


def dispatch_batched(tokens: Tensor, assignment: Assignment, experts: Experts) -> Tensor:
    """`dispatch` with all experts computed in batched matrix products, on buffers (E, capacity, D)."""
    starts = assignment.counts.cumsum(0) - assignment.counts
    places = torch.arange(assignment.capacity, device=tokens.device)
    rows = (starts.unsqueeze(1) + places).clamp(max=len(assignment.tokens) - 1)
    outputs = experts(tokens[assignment.tokens[rows]]).flatten(0, 1)
    own = torch.arange(len(assignment.tokens), device=tokens.device) - starts[assignment.experts]
    return outputs[assignment.experts * assignment.capacity + own.clamp(max=assignment.capacity - 1)]


def combine(outputs: Tensor, assignment: Assignment, heard: Tensor, tokens: int) -> Tensor:
    """Sum the outputs of each token's experts, weighted.

    Args:
        outputs: (T, D) outputs of the pairs.
        assignment: The pairs and their weights.
        heard: (E,) factor of each expert, see `Experts`.
        tokens: Number of tokens S.

    Returns:
        (S, D); zeros for a token without an expert.
    """
    weights = assignment.weights * heard[assignment.experts]
    weighted = outputs * weights.unsqueeze(1)
    total = weighted.new_zeros(tokens, outputs.shape[1])
    return total.index_add(0, assignment.tokens, weighted).to(outputs.dtype)


def scatter_outputs(outputs: Tensor, assignment: Assignment, tokens: int, experts: int) -> Tensor:
    """Lay out the weighted output of every expert for every token.

    Args:
        outputs: (T, D) outputs of the pairs.
        assignment: The pairs and their weights.
        tokens: Number of tokens S.
        experts: Number of experts E.

    Returns:
        (E, S, D); zeros where an expert does not process a token.
    """
    weighted = outputs * assignment.weights.unsqueeze(1)
    table = weighted.new_zeros(experts * tokens, outputs.shape[1])
    return table.index_copy(0, assignment.experts * tokens + assignment.tokens, weighted).unflatten(
        0, (experts, tokens)
    )
