"""Resetting the routers or other modules of a model, and the learning rate of routers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.requirements import router_of


def router_lr(task: DefenseTask, lr: float | None) -> float | None:
    """Return the peak learning rate of routers: `lr`; if None, that of the run's gates, if there are any."""
    return task.gate_train.lr if lr is None and task.gate_train is not None else lr


def reset_routers(task: DefenseTask) -> None:
    """Re-initialise the routers of the task's model, in place. Masked experts stay masked.

    Raises:
        ConfigError: The model has no router.
    """
    reset_modules(router_of(task.model), router_of(task.fresh()))


@torch.no_grad()
def reset_modules(modules: Iterable[nn.Module], drawn: Iterable[nn.Module]) -> None:
    """Copy all weights of newly initialised modules into modules with the same shapes, in place."""
    for own, new in zip(modules, drawn, strict=True):
        fresh = new.state_dict()
        for name, tensor in own.state_dict().items():
            # Tensors of other types, such as the mask of experts, are not learned.
            if tensor.is_floating_point():
                tensor.copy_(fresh[name])
