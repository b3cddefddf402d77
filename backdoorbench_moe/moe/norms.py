"""Measuring the inputs of batch norms, and recomputing their running statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorbench_moe.moe.temporary import hooked


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms of a model that have a scale and running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None
    }


@torch.no_grad()
def measure_statistics(
    model: nn.Module, rows: Mapping[str, tuple[int, int]], run: Callable[[], object]
) -> None:
    """Set running means and variances of batch norms to the moments of their inputs in evaluation mode, in place.

    Norms are measured one after the other, in the order of `model.named_modules()`, so that the inputs of later norms
    are normalised with the new statistics of earlier ones. The variance is unbiased, as in training.

    Args:
        model: The model, in evaluation mode.
        rows: The channels (start, stop) to set, by state-dict name. Names that are not running statistics are ignored.
        run: Function that passes the same images through the model each time. It is called once for each norm.

    Raises:
        ValueError: A norm is not called, or receives a single value for a channel.
    """
    for name, module in model.named_modules():
        keys = f"{name}.running_mean", f"{name}.running_var"
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and any(k in rows for k in keys)
        ):
            if not (found := input_moments([module], run)):
                raise ValueError(f"measure_statistics: expected the run to call {name}")
            mean, variance, _ = found[module]
            for key, values in zip(keys, (mean, variance), strict=True):
                start, stop = rows.get(key, (0, 0))
                model.state_dict()[key][start:stop].copy_(values[start:stop])


def input_moments(
    modules: Sequence[nn.Module], run: Callable[[], object]
) -> dict[nn.Module, tuple[Tensor, Tensor, int]]:
    """Measure the inputs of modules during `run()`, for each channel.

    Batches are merged by the formula of Chan, Golub and LeVeque (1983), which is numerically stable.

    Args:
        modules: Modules with an input (B, C, ...), such as batch norms.
        run: Function that passes images through the model, once.

    Returns:
        For each module that is called with any values, the mean and the unbiased variance, (C,) float64 each, and the
        number of values of a channel.

    Raises:
        ValueError: A module receives a single value for a channel.
    """
    found: dict[nn.Module, _Moments] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        values = [*inputs, *named.values()][0]
        # A norm of an expert may receive no token of a batch.
        if values.numel():
            found.setdefault(module, _Moments()).add(values.detach().float())

    with hooked(m.register_forward_pre_hook(add, with_kwargs=True) for m in dict.fromkeys(modules)):
        run()
    if any(each.count < 2 for each in found.values()):
        raise ValueError("input_moments: expected the run to pass at least two values a channel")
    return {
        module: (each.mean, each.squares / (each.count - 1), each.count) for module, each in found.items()
    }


class _Moments:
    """Mean and sum of squared deviations of all values so far, (C,) float64 each, and their number."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add the values of a batch, (B, C, ...)."""
        spread, own = torch.var_mean(values, dim=[d for d in range(values.ndim) if d != 1], correction=0)
        new, mean = values.numel() // values.shape[1], self.mean.to(own.device)
        apart, total = own.double() - mean, self.count + new
        self.squares = (
            self.squares.to(own.device) + spread.double() * new + apart**2 * (self.count * new / total)
        )
        self.mean, self.count = mean + apart * (new / total), total
