"""Measuring the running statistics of batch norms anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def measure_statistics(
    model: nn.Module, rows: Mapping[str, tuple[int, int]], run: Callable[[], object]
) -> None:
    """Set running means and variances of batch norms to the moments of their inputs in evaluation mode, in place.

    Norms are measured one after the other, in the order of `model.named_modules()`. A norm behind another therefore
    sees inputs that were normalised with the new statistics. The variance is unbiased, as in training.

    Args:
        model: The model, in evaluation mode.
        rows: The channels (start, stop) to set, by state-dict name. Names that are not running statistics are ignored.
        run: Function that passes the same images through the model each time it is called, once for each norm.

    Raises:
        ValueError: If a norm receives fewer than two values for a channel.
    """
    for name, module in model.named_modules():
        keys = f"{name}.running_mean", f"{name}.running_var"
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and any(k in rows for k in keys)
        ):
            found = _moments(module, run)
            for key, values in zip(keys, found, strict=True):
                start, stop = rows.get(key, (0, 0))
                model.state_dict()[key][start:stop].copy_(values[start:stop])


def _moments(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, (C,) float64 each, of a module's inputs (B, C, ...) during `run()`.

    Batches are merged by the formula of Chan, Golub and LeVeque (1983), which is numerically stable.
    """
    count = 0
    mean = squares = torch.zeros((), dtype=torch.float64)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count, mean, squares
        values = inputs[0].detach().float()
        spread, own = torch.var_mean(values, dim=[d for d in range(values.ndim) if d != 1], correction=0)
        new, apart = values.numel() // values.shape[1], own.double() - mean.to(own.device)
        squares = squares.to(own.device) + spread.double() * new + apart**2 * (count * new / (count + new))
        mean, count = mean.to(own.device) + apart * (new / (count + new)), count + new

    hook = module.register_forward_pre_hook(add)
    try:
        run()
    finally:
        hook.remove()
    if count < 2:
        raise ValueError("measure_statistics: expected the run to pass at least two values a channel")
    return mean, squares / (count - 1)
