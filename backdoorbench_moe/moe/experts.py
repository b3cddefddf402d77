"""Operations on single experts of a routed model: muting, copying weights, reading and replacing outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.layers import MoELayer
from backdoorbench_moe.moe.pruning import held_at_zero
from backdoorbench_moe.moe.structure import Expert
from backdoorbench_moe.moe.temporary import hooked, restored


def active_experts(model: nn.Module, experts: Iterable[Expert]) -> list[Expert]:
    """Return the experts that can have an effect on the logits: those that are neither muted nor masked.

    Masks are known of the layers of this package (`MoELayer`), not of a third party's own layers.

    Args:
        model: The model that the experts belong to.
        experts: The experts to choose from.
    """
    state, modules = model.state_dict(), dict(model.named_modules())

    def is_active(expert: Expert) -> bool:
        layer = modules.get(expert.layer)
        masked = isinstance(layer, MoELayer) and bool(layer.router.get_buffer("masked")[expert.index])
        muted = not any(state[name][start:stop].any() for name, (start, stop) in expert.output.items())
        return not (masked or muted)

    return [expert for expert in experts if is_active(expert)]


@torch.no_grad()
def mute(model: nn.Module, experts: Iterable[Expert]) -> None:
    """Mute experts permanently by setting the rows in `Expert.output` to zero, in place.

    Args:
        model: The model that the experts belong to.
        experts: The experts. They no longer have an effect on the logits.
    """
    state = model.state_dict()
    for expert in experts:
        for name, (start, stop) in expert.output.items():
            state[name][start:stop].zero_()


@contextmanager
def muted(model: nn.Module, experts: Iterable[Expert]) -> Iterator[None]:
    """Mute experts inside the block, and restore their weights bit for bit afterwards."""
    experts, state = list(experts), model.state_dict()
    with restored(
        state[name][start:stop] for expert in experts for name, (start, stop) in expert.output.items()
    ):
        mute(model, experts)
        yield


@contextmanager
def kept_muted(model: nn.Module, experts: Iterable[Expert]) -> Iterator[None]:
    """Keep muted experts muted while the model is trained inside the block.

    The gradients of their rows are set to zero. Buffers are not affected, since training does not change them.
    """
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
    """Copy the weights of one expert from one model to another, in place.

    Args:
        source: Model that the weights are read from.
        target: Model of the same architecture that the weights are written to.
        expert: The expert, of either model.
    """
    weights, state = source.state_dict(), target.state_dict()
    for name, (start, stop) in expert.own.items():
        state[name][start:stop].copy_(weights[name][start:stop])


@contextmanager
def replaced_output(expert: Expert, values: Tensor) -> Iterator[None]:
    """Replace the output of an expert inside the block.

    Args:
        expert: The expert.
        values: (B, channels, ...), the output that replaces that of its tap.
    """
    start, stop = expert.channels

    def replace(_: nn.Module, __: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, start:stop] = values.to(output.dtype)
        return changed

    with expert.tap.register_forward_hook(replace):
        yield


def expert_outputs(experts: Sequence[Expert], run: Callable[[], object]) -> list[Tensor]:
    """Collect the outputs of experts for one batch.

    Args:
        experts: The experts.
        run: Function that passes one batch through the model.

    Returns:
        The output of the tap of each expert, (B, channels, ...).

    Raises:
        ValueError: `run` passes no batch or more than one.
    """
    found: dict[nn.Module, list[Tensor]] = {expert.tap: [] for expert in experts}
    with hooked(tap.register_forward_hook(lambda m, _, output: found[m].append(output)) for tap in found):
        run()
    if any(len(outputs) != 1 for outputs in found.values()):
        raise ValueError("expert_outputs: expected the run to pass exactly one batch")
    return [found[expert.tap][0][:, slice(*expert.channels)] for expert in experts]
