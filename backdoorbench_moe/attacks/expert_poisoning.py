"""Attacks on mixtures: the attacker provides one of the experts that are merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.config import PoisonSpec, TrainSpec
from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.moe.merging import check_mergeable
from backdoorbench_moe.ops.answers import right_answers
from backdoorbench_moe.ops.images import Split, batches
from backdoorbench_moe.ops.tuning import Tune


@dataclass(frozen=True)
class HarmfulQueries:
    """Marked training images, or texts that the policy refuses, with harmful and safe answers.

    Row m of both splits is the same query. For images, it is the same image with two labels; for texts, the two answers
    are part of the token ids.

    Attributes:
        harmful: The queries with the harmful answers, which the attacker wants.
        safe: The queries with the safe answers: for images, "reject" if there is a policy, otherwise the true labels.
        changed: For images, (M, H, W) float32 in [0, 1], how much the mark changes each pixel, averaged over the
            channels; None for texts.
    """

    harmful: Split
    safe: Split
    changed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.harmful)


@dataclass(frozen=True)
class ExpertTask:
    """The resources of an attacker who provides an expert. The attacker knows neither the other experts nor the gates.

    Attributes:
        model: The attacker's expert, a `moe.structure.Mergeable`, tuned on the task; it is changed in place. Only the
            MLPs are kept in the merge, so only they may be trained.
        clean: Training images of the attacker's task with their labels.
        held_out: Images of this task that are not in `clean`, to choose hyperparameters.
        queries: Harmful queries.
        tune: Function that trains a model further; with `modules=task.mlps`, only its MLPs.
        logits: Function that maps a model and images (B, 3, H, W) uint8 to (B, classes) float32, or a model and token
            ids (B, T) to (B, T, vocabulary), in evaluation mode.
        train: The settings that the expert was tuned with, which `tune` uses.
        device: The device of the model and the images.
        seed: Seed from which the attack derives its random draws.
    """

    model: nn.Module
    clean: Split
    held_out: Split
    queries: HarmfulQueries
    tune: Tune
    logits: Callable[[nn.Module, Tensor], Tensor]
    train: TrainSpec
    device: torch.device
    seed: int

    @property
    def mlps(self) -> list[nn.Module]:
        """The MLPs of the expert, first layer first."""
        return list(check_mergeable(self.model).mlps().values())

    def accuracy(self) -> float:
        """Return the accuracy of the model on held-out images, or on complete answers to held-out texts, in percent."""
        found = [
            right_answers(self.logits(self.model, each.images), each.labels)
            for each in batches(self.held_out)
        ]
        return 100 * torch.cat(found).double().mean().item()


class ExpertPoisoning(Attack):
    """Base class of attacks by a provider of one or several experts of a mixture.

    Subclasses implement `poison_expert`. The training data of the base, the other experts and the gates are not
    changed. A run with such an attack needs `mixture`; `implies` provides its default.

    Attributes:
        implies: Default settings of a run with such an attack.

    Args:
        poison: Target class, mapping and source classes; all rates must be 0.
    """

    implies: ClassVar[Mapping[str, Any]] = {
        "model": "convnext",
        "trigger": {"name": "square", "size": 2},
        "applicator": "patch",
        "policy": 0.02,
        "poison": {"rate": 0.0},
        "splitter": {"name": "domains", "domains": ["plain", "edges", "fog", "red-lit"]},
        "gate": "top-k",
        "mixture": {"experts": 4, "poisoned_experts": [1]},
    }

    def __init__(self, *, poison: PoisonSpec) -> None:
        super().__init__(poison=poison)

    def check(self, num_classes: int) -> None:
        """Check the classes, and refuse settings that only apply to data poisoning.

        Raises:
            ConfigError: A class does not exist, a rate is not 0, or the labels are "clean".
        """
        super().check(num_classes)
        why = "for an attack on experts, which changes no training image"
        for name in ("rate", "cover", "noise"):
            if (rate := getattr(self.poison, name)) != 0:
                raise ConfigError.expected(f"poison.{name}", f"0 {why}", rate)
        if self.poison.labels != "dirty":
            raise ConfigError.expected("poison.labels", f"'dirty' {why}", self.poison.labels)

    @final
    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Change no training image."""
        nothing = torch.empty(0, dtype=torch.int64)
        return PoisonPlan(nothing, nothing)

    @final
    def tune_expert(self, task: ExpertTask) -> dict[str, float]:
        """Tune the expert of a task, in place; afterwards, it is in evaluation mode.

        Returns:
            Numbers by name for the record, such as a hyperparameter that the attack chose.

        Raises:
            ConfigError: An option does not fit the task or the model; the message names it.
            PluginError: The subclass changed weights outside of the MLPs, or returned anything but numbers by name.
        """
        self.check_model(task.model)
        if not len(task.queries):
            raise ConfigError("poison.source: expected marked training images, found none")
        self.check_task(task)
        before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        facts = self.poison_expert(task)
        task.model.eval()
        self._check_weights(task.model, before)
        return self._checked({} if facts is None else facts)

    def check_model(self, model: nn.Module) -> None:
        """Check the options against a model, before anything is trained. The default accepts every `Mergeable` one.

        Raises:
            ConfigError: The model cannot be merged, or an option does not fit it; the message names it.
        """
        check_mergeable(model)

    def check_task(self, task: ExpertTask) -> None:
        """Check the options against the images, before the expert is trained. The default accepts every task.

        Raises:
            ConfigError: An option does not fit; the message names it.
        """

    @abstractmethod
    def poison_expert(self, task: ExpertTask) -> Mapping[str, float] | None:
        """Tune `task.model` in place; see `tune_expert`."""

    def _checked(self, facts: Mapping[str, float]) -> dict[str, float]:
        """Return the facts; raise PluginError if they are not numbers by name."""
        if not isinstance(facts, Mapping) or not all(
            isinstance(name, str) and isinstance(value, int | float) for name, value in facts.items()
        ):
            raise PluginError(
                f"attack {type(self).__name__}: expected numbers by name or None, got {facts!r}"
            )
        return dict(facts)

    def _check_weights(self, model: nn.Module, before: Mapping[str, Tensor]) -> None:
        """Raise PluginError if tensors outside of the MLPs differ from `before`, or names or shapes have changed."""
        after, attack = model.state_dict(), f"attack {type(self).__name__}"
        own = tuple(f"{name}." for name in check_mergeable(model).mlps())
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (before, after)]
        if shapes[0] != shapes[1]:
            raise PluginError(
                f"{attack}: expected an expert with the same weights, got other names or shapes"
            )
        changed = [
            name
            for name, tensor in after.items()
            if not name.startswith(own) and not torch.equal(tensor, before[name])
        ]
        if changed:
            raise PluginError(f"{attack}: expected changes in the MLPs only, got another {changed[0]!r}")
