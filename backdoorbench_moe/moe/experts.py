"""Single experts of a routed model: muting them, and giving them other weights or outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.pruning import held_at_zero
from backdoorbench_moe.moe.structure import Expert


@torch.no_grad()
def mute(model: nn.Module, experts: Iterable[Expert]) -> None:
    """Let these experts of the model have no effect on its logits any more, in place."""
    state = model.state_dict()
    for expert in experts:
        for name, (start, stop) in expert.output.items():
            state[name][start:stop].zero_()


@contextmanager
def muted(model: nn.Module, experts: Iterable[Expert]) -> Iterator[None]:
    """Mute these experts inside the block; afterwards their weights are what they were, bit for bit."""
    experts, state = list(experts), model.state_dict()
    kept = [
        (state[name][start:stop], state[name][start:stop].clone())
        for expert in experts
        for name, (start, stop) in expert.output.items()
    ]
    try:
        mute(model, experts)
        yield
    finally:
        for rows, values in kept:
            rows.copy_(values)


@contextmanager
def kept_muted(model: nn.Module, experts: Iterable[Expert]) -> Iterator[None]:
    """Keep experts that `mute` muted so while the block trains; of buffers, training does not change these."""
    parameters = dict(model.named_parameters())
    rows = [
        (parameters[name], torch.arange(start, stop))
        for expert in experts
        for name, (start, stop) in expert.output.items()
        if name in parameters
    ]
    with held_at_zero(rows):
        yield


@torch.no_grad()
def copy_expert(source: nn.Module, target: nn.Module, expert: Expert) -> None:
    """Give one expert of `target` the weights it has in `source`, a model of the same make, in place."""
    weights, state = source.state_dict(), target.state_dict()
    for name, (start, stop) in expert.own.items():
        state[name][start:stop].copy_(weights[name][start:stop])


@contextmanager
def replaced_output(expert: Expert, values: Tensor) -> Iterator[None]:
    """Let an expert give `values` inside the block, whatever comes in: (B, channels, ...) as its tap gives."""
    start, stop = expert.channels

    def replace(_: nn.Module, __: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, start:stop] = values.to(output.dtype)
        return changed

    hook = expert.tap.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def expert_outputs(experts: Sequence[Expert], run: Callable[[], object]) -> list[Tensor]:
    """What each expert gives while `run()` passes one batch: (B, channels, ...) each.

    Raises ValueError if no batch passed, or more than one.
    """
    found: dict[nn.Module, list[Tensor]] = {expert.tap: [] for expert in experts}
    hooks = [tap.register_forward_hook(lambda m, _, output: found[m].append(output)) for tap in found]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(outputs) != 1 for outputs in found.values()):
        raise ValueError("expert_outputs: expected the run to pass exactly one batch")
    return [found[expert.tap][0][:, slice(*expert.channels)] for expert in experts]
