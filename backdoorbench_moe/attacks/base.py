"""The attack interface, and the plan of the training images that an attack changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from backdoorbench_moe.config import PoisonSpec, class_number
from backdoorbench_moe.errors import ConfigError, PluginError


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class PoisonPlan:
    """The training images that the attacker changes, in three disjoint groups.

    The tensors are on the CPU, and the indices of each group are in ascending order. The forms of a trigger are defined
    in `triggers.base.Trigger`.

    Args:
        indices: (n,) int64 indices of the *poison* group: images that are stamped with the trigger's training form
            and get new labels.
        labels: (n,) int64, the new labels of the poison group.
        cover: (c,) int64 indices of the *cover* group: images that are stamped with the trigger's training form and
            keep their labels.
        noise: (m,) int64 indices of the *noise* group: images that are stamped with the trigger's noise form and keep
            their labels.
    """

    indices: Tensor
    labels: Tensor
    cover: Tensor = field(default_factory=_nothing)
    noise: Tensor = field(default_factory=_nothing)

    @property
    def groups(self) -> dict[str, Tensor]:
        """The indices of each group by its name in `poison.npz`, where the poison group is called "indices"."""
        return {"indices": self.indices, "cover": self.cover, "noise": self.noise}


class Attack(ABC):
    """Base class of attacks: which training images are changed, and the target class of triggered images.

    Subclasses implement `plan`. Users call an instance, which checks arguments and results.

    Attributes:
        uses_trigger: Whether the attack stamps a trigger. If False, the spec must not have a trigger or an applicator.
        tiny: Options with which the conformance tests build the attack.
        deviations: Conformance tests that the attack is known to fail: the reason for each, by name of the test.

    Args:
        poison: Which training images are poisoned, and their labels.
    """

    uses_trigger: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *, poison: PoisonSpec) -> None:
        self.poison = poison

    @final
    def __call__(self, labels: Tensor, *, num_classes: int, seed: int) -> PoisonPlan:
        """Choose the training images to change. Called once, before training.

        Args:
            labels: (N,) int64 true labels of the full training set, on any device.
            num_classes: Number of classes of the data.
            seed: The run's seed. The same seed gives the same plan.

        Returns:
            The plan, on the CPU.

        Raises:
            ConfigError: The data do not have the classes or images that the attack needs.
            PluginError: The subclass did not return a valid plan.
        """
        self.check(num_classes)
        plan = self.plan(labels.cpu().long(), num_classes, seed)
        _check_plan(plan, len(labels), num_classes, type(self).__name__)
        return plan

    def check(self, num_classes: int) -> None:
        """Check the target and the source classes against the data.

        Raises:
            ConfigError: A class does not exist in the data, or is given by name instead of number; or, in an all-to-one
                attack with dirty labels, the target is one of the source classes, so that its images would keep their
                label.
        """
        poison = self.poison
        for name, labels in (("poison.target", (poison.target,)), ("poison.source", poison.source)):
            for label in labels:
                if class_number(name, label) >= num_classes:
                    raise ConfigError.expected(name, f"a class in 0..{num_classes - 1}", label)
        if poison.mapping == "all-to-one" and poison.labels == "dirty" and poison.target in poison.source:
            raise ConfigError.expected(
                "poison.source",
                f"classes other than the target {poison.target}, whose label is kept",
                poison.source,
            )

    @abstractmethod
    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Choose the images; see `__call__`, which calls this after `check`, with `labels` on the CPU."""

    def wanted(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the target class of each image: the class that the attacker wants for the triggered image.

        Args:
            labels: (N,) int64 true labels.
            num_classes: Number of classes of the data.

        Returns:
            (N,) int64 classes.
        """
        if self.poison.mapping == "all-to-all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, class_number("poison.target", self.poison.target))

    def counted(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return which test images the attack success rate (ASR) is measured on.

        These are the images whose true label differs from their target class (see `wanted`); with source classes, only
        those of the source classes.

        Args:
            labels: (N,) int64 true labels.
            num_classes: Number of classes of the data.

        Returns:
            (N,) bool, with at least one True.

        Raises:
            ConfigError: There are no such images.
        """
        counted = self.wanted(labels, num_classes) != labels
        if self.poison.source:
            source = [class_number("poison.source", label) for label in self.poison.source]
            counted &= torch.isin(labels, torch.tensor(source, device=labels.device))
        if not counted.any():
            asked = f"source={list(self.poison.source) or 'all'}"
            if self.poison.mapping == "all-to-all":
                what = "poison.mapping: expected at least 2 classes, and test images"
            else:
                what = f"poison.target: expected test images of other classes than the target {self.poison.target}"
            raise ConfigError(f"{what} ({asked}) to measure ASR on, found none")
        return counted


def _check_plan(plan: object, images: int, num_classes: int, attack: str) -> None:
    """Raise PluginError unless `plan` is a PoisonPlan with disjoint groups, indices in range and valid labels."""
    if not isinstance(plan, PoisonPlan):
        raise PluginError(f"attack {attack}: expected a PoisonPlan, got {plan!r}")
    for name, group in plan.groups.items():
        if not _is_int64_vector(group) or (group.diff() <= 0).any():
            raise PluginError(
                f"attack {attack}: {name}: expected int64 indices in ascending order on the CPU, got {group}"
            )
    together = torch.cat(list(plan.groups.values()))
    if len(together.unique()) < len(together):
        raise PluginError(f"attack {attack}: expected disjoint groups, got an image in two of them")
    if len(together) and not 0 <= int(together.min()) <= int(together.max()) < images:
        raise PluginError(f"attack {attack}: expected indices in 0..{images - 1}, got {together}")
    labels = plan.labels
    if (
        not _is_int64_vector(labels)
        or len(labels) != len(plan.indices)
        or not ((labels >= 0) & (labels < num_classes)).all()
    ):
        raise PluginError(
            f"attack {attack}: expected a label in 0..{num_classes - 1} for each poisoned image, int64 on the CPU, "
            f"got {labels}"
        )


def _is_int64_vector(values: object) -> bool:
    """Whether a value is a one-dimensional int64 tensor on the CPU."""
    return (
        isinstance(values, Tensor)
        and values.dtype == torch.int64
        and values.ndim == 1
        and values.device.type == "cpu"
    )
