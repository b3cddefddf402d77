"""Channels of a layer: how active they are, and setting the least active to zero for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def channel_means(
    modules: Iterable[nn.Module], run: Callable[[], object], *, rectify: bool
) -> dict[nn.Module, Tensor]:
    """Mean output of each channel over everything that passes while `run()` runs.

    modules: convolutions and their norms give (B, C, H, W), all others (..., C). rectify: of max(output, 0), as
    behind a ReLU. Returns (C,) float64 on the CPU for each module. Raises ValueError for a module that nothing passed.
    """
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        values = output.detach().float()
        at = 1 if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else values.ndim - 1
        others = [dim for dim in range(values.ndim) if dim != at]
        values = (values.relu() if rectify else values).sum(others, dtype=torch.float64)
        sums[module] = sums[module] + values if module in sums else values
        counts[module] = counts.get(module, 0) + output.numel() // output.shape[at]

    wanted = list(dict.fromkeys(modules))
    hooks = [module.register_forward_hook(add) for module in wanted]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if len(sums) < len(wanted):
        raise ValueError("channel_means: expected the run to pass every module")
    # Through numbers, since what was summed in inference mode may not be used outside of it.
    means = {module: (total / counts[module]).tolist() for module, total in sums.items()}
    return {module: torch.tensor(values, dtype=torch.float64) for module, values in means.items()}


def lowest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest of (C,) scores, ascending; of equals, the first ones."""
    return scores.sort(stable=True).indices[:count].sort().values


@torch.no_grad()
def silence(module: nn.Module, channels: Tensor) -> None:
    """Set weight and bias of a module's output channels, (n,) int64, to zero."""
    for parameter in _parameters(module):
        parameter.index_fill_(0, channels.to(parameter.device), 0)


@contextmanager
def silenced(pruned: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Keep channels that `silence` set to zero there while the block trains."""
    with held_at_zero([(p, channels) for module, channels in pruned for p in _parameters(module)]):
        yield


@contextmanager
def held_at_zero(rows: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Keep rows of parameters, (n,) int64 each, that are zero so while the block trains: their gradients are zero.

    SGD, with momentum or without, and AdamW leave a weight of zero whose gradients are zero where it is.
    """
    hooks = [p.register_post_accumulate_grad_hook(_clear(chosen.to(p.device))) for p, chosen in rows]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _clear(rows: Tensor) -> Callable[[Tensor], None]:
    def clear(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.index_fill_(0, rows, 0)

    return clear


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter)]
