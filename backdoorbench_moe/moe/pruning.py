"""Pruning of channels: measuring their activity, setting their weights to zero, and keeping them zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from backdoorbench_moe.moe.temporary import hooked


def channel_means(
    modules: Iterable[nn.Module], run: Callable[[], object], *, rectify: bool
) -> dict[nn.Module, Tensor]:
    """Measure the mean output of each channel during `run()`.

    Args:
        modules: Convolutions and batch norms, with an output (B, C, ...), or other modules with an output (..., C).
        run: Function that passes images through the model.
        rectify: Whether to average max(output, 0), as after a ReLU, instead of the output.

    Returns:
        For each module, (C,) float64 on the CPU: the means over all other dimensions and all calls.

    Raises:
        ValueError: `run` did not call one of the modules.
    """
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        values = output.detach().float()
        at = 1 if isinstance(module, _ConvNd | _BatchNorm) else values.ndim - 1
        others = [dim for dim in range(values.ndim) if dim != at]
        values = (values.relu() if rectify else values).sum(others, dtype=torch.float64)
        sums[module] = sums[module] + values if module in sums else values
        counts[module] = counts.get(module, 0) + output.numel() // output.shape[at]

    wanted = list(dict.fromkeys(modules))
    with hooked(module.register_forward_hook(add) for module in wanted):
        run()
    if len(sums) < len(wanted):
        raise ValueError("channel_means: expected `run` to call every module")
    # Converted to Python numbers and back, since operations on inference tensors may fail outside inference mode.
    means = {module: (total / counts[module]).tolist() for module, total in sums.items()}
    return {module: torch.tensor(values, dtype=torch.float64) for module, values in means.items()}


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` lowest of (C,) scores, in ascending order; of equal scores, the first."""
    return scores.sort(stable=True).indices[:count].sort().values


@torch.no_grad()
def silence(module: nn.Module, channels: Tensor) -> None:
    """Set the weights and biases of output channels to zero, in place.

    Args:
        module: A layer or norm whose `weight` and `bias` have one row for each channel; either may be None.
        channels: (n,) int64, indices of the channels.
    """
    for parameter in _parameters(module):
        parameter.index_fill_(0, channels.to(parameter.device), 0)


@contextmanager
def kept_silent(pruned: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Keep channels at zero while the model is trained inside the block; see `held_at_zero`.

    Args:
        pruned: Modules and the indices of their channels, (n,) int64, that were set to zero by `silence`.
    """
    with held_at_zero([(p, channels) for module, channels in pruned for p in _parameters(module)]):
        yield


@contextmanager
def held_at_zero(rows: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Keep rows of parameters at zero while the model is trained inside the block.

    Hooks set the gradients of these rows to zero. SGD, with or without momentum, and AdamW then do not change them, if
    the optimizer is created inside the block.

    Args:
        rows: Parameters and the indices of their rows, (n,) int64, which must be zero. Parameters that do not require
            gradients get no hook; they must not be made to require gradients inside the block.
    """
    with hooked(
        parameter.register_post_accumulate_grad_hook(_clear(chosen.to(parameter.device)))
        for parameter, chosen in rows
        if parameter.requires_grad
    ):
        yield


def _clear(rows: Tensor) -> Callable[[Tensor], None]:
    def clear(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.index_fill_(0, rows, 0)

    return clear


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter)]
