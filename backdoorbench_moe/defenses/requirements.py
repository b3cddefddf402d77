"""Checks of options and models that several defenses share, and the clean accuracy by which they rank experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import muted
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import Expert, Structured, WithExperts
from backdoorbench_moe.ops.ranges import check_integer, check_positive

# What a defense trains: everything, or one component of `Structured`.
Scope = Literal["all", "experts", "router", "head"]


def check_tuning(epochs: int, lr: float | None, *, at_least: int) -> None:
    """Check the options for tuning on clean images.

    Raises:
        ConfigError: There are fewer than `at_least` epochs, or the learning rate is not a positive number.
    """
    check_integer("epochs", epochs, at_least)
    check_positive(lr=lr)


def structure(model: object) -> Structured:
    """Return the model as a `Structured` one.

    Raises:
        ConfigError: It does not implement this protocol.
    """
    if not isinstance(model, Structured):
        raise ConfigError(
            f"scope: the model {type(model).__name__} does not name its components: "
            "expected methods `components` and `prunable` (see backdoorbench_moe.moe.structure)"
        )
    return model


def modules_in(model: object, scope: Scope) -> list[nn.Module] | None:
    """Return the modules that a scope trains; None for "all", which needs no `Structured` model.

    Raises:
        ConfigError: The model does not have the component, or is not `Structured`.
    """
    if scope == "all":
        return None
    components = structure(model).components()
    if scope not in components:
        raise ConfigError.expected(
            "scope", f"one of {['all', *components]} for {type(model).__name__}", scope
        )
    return components[scope]


def router_of(model: object) -> list[nn.Module]:
    """Return the modules of the model's router.

    Raises:
        ConfigError: The model has no router, or is not `Structured`.
    """
    return _component(model, "router")


def head_of(model: object) -> list[nn.Module]:
    """Return the modules of the model's head.

    Raises:
        ConfigError: The model has no head, or is not `Structured`.
    """
    return _component(model, "head")


def _component(model: object, name: str) -> list[nn.Module]:
    if not (modules := structure(model).components().get(name)):
        raise ConfigError(f"model: expected a model with a {name}, {type(model).__name__} has none")
    return modules


def check_routed(model: object) -> None:
    """Check that the model is a `RoutedModel`.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(model, RoutedModel):
        raise ConfigError(f"model: expected a routed model, {type(model).__name__} has no routing")


def experts_of(model: object) -> list[Expert]:
    """Return all experts of a model.

    Raises:
        ConfigError: The model has no routing, or does not implement the protocol `WithExperts`.
    """
    check_routed(model)
    if not isinstance(model, WithExperts):
        raise ConfigError(
            f"model: {type(model).__name__} does not name its experts: "
            "expected a method `experts` (see backdoorbench_moe.moe.structure)"
        )
    return model.experts()


def treats_experts(model: nn.Module, experts: bool | None) -> bool:
    """Return whether a defense treats experts as separate units.

    Args:
        model: The model.
        experts: The user's choice; None for "if the model has experts".

    Raises:
        ConfigError: The user chose True, but the model does not name its experts.
    """
    if experts is None:
        return isinstance(model, RoutedModel) and isinstance(model, WithExperts)
    if experts:
        experts_of(model)
    return experts


def clean_accuracy(task: DefenseTask) -> float:
    """Return the accuracy, in percent, of the task's model on the images that the defender holds."""
    predicted = task.logits(task.model, task.clean.images).argmax(1)
    return 100 * (predicted == task.clean.labels).double().mean().item()


def accuracy_without(
    task: DefenseTask, candidates: Iterable[Expert], dropped: Sequence[Expert] = ()
) -> dict[str, float]:
    """Measure the clean accuracy without each of some experts.

    Args:
        task: The task; its model is evaluated and not changed.
        candidates: Experts that are muted one at a time.
        dropped: Experts that are muted in all measurements.

    Returns:
        Clean accuracy in percent, by name of the candidate.
    """
    found = {}
    for expert in candidates:
        with muted(task.model, [*dropped, expert]):
            found[expert.name] = clean_accuracy(task)
    return found


def least_missed(experts: Iterable[Expert], accuracy: Mapping[str, float]) -> Expert:
    """Return the expert without which the accuracy is highest; in a tie, the first one.

    Args:
        experts: The experts to choose from.
        accuracy: As returned by `accuracy_without`.
    """
    return max(experts, key=lambda expert: accuracy[expert.name])
