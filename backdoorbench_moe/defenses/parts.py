"""What several defenses ask of their options and of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import muted
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import Expert, Structured, WithExperts


def check_tuning(epochs: int, lr: float | None, *, at_least: int) -> None:
    """Raise ConfigError for fewer epochs than `at_least`, or a learning rate that is none."""
    if epochs < at_least:
        raise ConfigError.expected("epochs", f"a whole number from {at_least}", epochs)
    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigError.expected("lr", "a positive number", lr)


def structure(model: object) -> Structured:
    """The model as one that names its parts. Raises ConfigError if it does not."""
    if not isinstance(model, Structured):
        raise ConfigError(
            f"scope: the model {type(model).__name__} does not name its parts: "
            "expected methods `components` and `prunable` (see backdoorbench_moe.moe.structure)"
        )
    return model


def router_of(model: object) -> list[nn.Module]:
    """The modules of the model's router. Raises ConfigError if it has none, or does not name it."""
    if not (router := structure(model).components().get("router")):
        raise ConfigError(f"model: expected one with a router, {type(model).__name__} has no router")
    return router


def check_routed(model: object) -> None:
    """Raise ConfigError if the model has no routing."""
    if not isinstance(model, RoutedModel):
        raise ConfigError(f"model: expected a routed one, {type(model).__name__} has no experts to route to")


def experts_of(model: object) -> list[Expert]:
    """All experts of a model. Raises ConfigError if it has none, or does not say where they lie."""
    check_routed(model)
    if not isinstance(model, WithExperts):
        raise ConfigError(
            f"model: {type(model).__name__} does not say where its experts lie: "
            "expected a method `experts` (see backdoorbench_moe.moe.structure)"
        )
    return model.experts()


def clean_accuracy(task: DefenseTask) -> float:
    """Share of the defender's images that the model, as it is now, gets right; in percent."""
    predicted = task.logits(task.model, task.clean.images).argmax(1)
    return 100 * (predicted == task.clean.labels).double().mean().item()


def accuracy_without(
    task: DefenseTask, candidates: Iterable[Expert], dropped: Sequence[Expert] = ()
) -> dict[str, float]:
    """Clean accuracy, in percent, of the model with each of the candidates muted alone, beside those dropped."""
    found = {}
    for expert in candidates:
        with muted(task.model, [*dropped, expert]):
            found[expert.name] = clean_accuracy(task)
    return found


def least_missed(experts: Iterable[Expert], accuracy: Mapping[str, float]) -> Expert:
    """The expert without which, by `accuracy_without`, the accuracy is highest; of equals, the first."""
    return max(experts, key=lambda expert: accuracy[expert.name])
