"""What a checkpoint of a training contains: weights, the states of optimizers, and how far the training is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records.reading import is_epoch_row

COMPANION = "companion."


@dataclass
class Progress:
    """The plain values of a checkpoint.

    Attributes:
        epoch: Number of finished epochs.
        history: One row for each finished epoch.
        seconds: Total duration of the finished epochs.
    """

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Companion:
    """Networks that an objective trains together with the model, such as those of a trigger.

    Attributes:
        networks: All networks, on the device.
        optimizer: The optimizer of the networks that are trained; its learning rate is constant.
        trained: The networks that are in training mode during training.
    """

    networks: nn.Module
    optimizer: torch.optim.Optimizer
    trained: Sequence[nn.Module]


def flatten(
    model: nn.Module, optimizer: torch.optim.Optimizer, companion: Companion | None
) -> dict[str, Tensor]:
    """Return the weights of a model and its companion, and the states of their optimizers, as one dict."""
    flat = _flatten(model, optimizer, "")
    return flat if companion is None else flat | _flatten(companion.networks, companion.optimizer, COMPANION)


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    flat = {f"{prefix}model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        flat |= {f"{prefix}optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
    return flat


def restore(
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    companion: Companion | None,
    epochs: int,
) -> Progress:
    """Restore a checkpoint in place, and return the progress of its training.

    Args:
        tensors: As returned by `flatten`.
        state: The fields of `Progress`.
        model: The model.
        optimizer: The optimizer of the model.
        companion: Networks that are trained together with the model, if any.
        epochs: Number of epochs of the complete training.

    Raises:
        RecordError: The checkpoint is damaged or belongs to another model.
    """
    load_weights(model, _part(tensors, "model."), "checkpoint")
    if companion is not None:
        load_weights(companion.networks, _part(tensors, f"{COMPANION}model."), "checkpoint")
    try:
        _restore_optimizer(optimizer, _part(tensors, "optimizer."))
        if companion is not None:
            _restore_optimizer(companion.optimizer, _part(tensors, f"{COMPANION}optimizer."))
        progress = Progress(**state)
        _check_progress(progress, epochs)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise RecordError(f"checkpoint: damaged ({error}); delete it to train from the start") from error
    return progress


def _check_progress(progress: Progress, epochs: int) -> None:
    """Raise ValueError unless the values are those after one of the epochs, since anyone may have written the file."""
    rows, done, seconds = progress.history, progress.epoch, progress.seconds
    if type(done) is not int or not 1 <= done <= epochs:
        raise ValueError(f"expected 1 to {epochs} finished epochs, found {done!r}")
    if type(seconds) is not float or not 0 < seconds < math.inf:
        raise ValueError(f"expected a positive number of seconds, found {seconds!r}")
    if not isinstance(rows, list) or len(rows) != done or not all(map(is_epoch_row, rows)):
        raise ValueError(f"expected one row of the history for each of {done} epochs")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state of an optimizer from tensors by index of the parameter and name, such as "3.exp_avg"."""
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # Fused optimizers require that a buffer has the memory format of its weight.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights, whose names and shapes must be exactly those of the model.

    Args:
        model: The model.
        tensors: Weights by name.
        source: Source of the weights, for error messages.

    Raises:
        RecordError: A name is missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise RecordError(
            f"{source}: weight {name!r} is {'missing' if name in own else 'unknown to the model'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise RecordError(
                f"{source}: weight {name!r}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
    model.load_state_dict(tensors)
