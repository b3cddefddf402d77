"""How a provider merges experts, fine-tuned by others, into a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.config.shorthand import read_rate
from backdoorbench_moe.config.train import TrainSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.options import convert_fields

TRAININGS = ("expert_train", "gate_train")
WEIGHTS = "mixture.expert_weights"


@dataclass(frozen=True)
class MixtureSpec:
    """Settings of a mixture: E experts are fine-tuned from one base model and merged under gates.

    The splitter and the gate are parts of the run's spec.

    Args:
        experts: Number of experts E, at least 2. Expert e is fine-tuned on task e of the splitter.
        poisoned_experts: Numbers of the experts that attackers provide; empty for a benign mixture.
        expert_policy: Number of marked images used to fine-tune an expert, as a share of the images of its task, in
            [0, 1); 0 for none, so that an expert may forget the policy that the base learned.
        expert_train: Settings for fine-tuning an expert from the base. Attacks on experts use them, too.
        gate_train: Settings for training the gates.
        gate_images: Number of training images of each task that the gates are trained on; None for 1 / E of the
            training set each.
        expert_weights: Checkpoint folders from which benign experts are read instead of being fine-tuned, by the
            expert's number; None for an expert that is fine-tuned. Only the MLPs of a checkpoint are used; all other
            weights are those of the base. The digest covers the content of the checkpoints, not their paths. An
            attacker starts from the given expert of the attacked task.
        task: The task of a single expert; None for the complete mixture. Set by the graph (see `engine.graph`).

    Raises:
        ConfigError: A value is out of range.
    """

    experts: int = 4
    poisoned_experts: tuple[int, ...] = ()
    expert_policy: float = 0.0
    expert_train: TrainSpec = field(default_factory=lambda: TrainSpec(epochs=2))
    gate_train: TrainSpec = field(default_factory=lambda: TrainSpec(epochs=2))
    gate_images: int | None = None
    expert_weights: tuple[str | None, ...] = ()
    task: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_policy", read_rate("mixture.expert_policy", self.expert_policy))
        plain_fields = (item.name for item in fields(self) if item.name not in TRAININGS)
        convert_fields(self, "mixture.", plain_fields)
        if self.experts < 2:
            raise ConfigError.expected("mixture.experts", "a number of at least 2", self.experts)
        known = range(self.experts)
        poisoned = self.poisoned_experts
        if self.task is None and not all(expert in known for expert in poisoned):
            raise ConfigError.expected(
                "mixture.poisoned_experts", f"numbers of experts in 0..{self.experts - 1}", poisoned
            )
        if len(set(poisoned)) != len(poisoned):
            raise ConfigError.expected("mixture.poisoned_experts", "each expert once", poisoned)
        object.__setattr__(self, "poisoned_experts", tuple(sorted(poisoned)))
        if not 0 <= self.expert_policy < 1:
            raise ConfigError.expected("mixture.expert_policy", "a number in [0, 1)", self.expert_policy)
        if self.gate_images is not None and self.gate_images < 1:
            raise ConfigError.expected("mixture.gate_images", "a number of at least 1", self.gate_images)
        for name in TRAININGS:
            if not getattr(self, name).epochs:
                raise ConfigError.expected(f"mixture.{name}.epochs", "at least 1", 0)
            if frozen := getattr(self, name).freeze:
                expected = "none, as only the experts or the gates are trained"
                raise ConfigError.expected(f"mixture.{name}.freeze", expected, frozen)
        if self.task is not None and self.task < 0:
            raise ConfigError.expected("mixture.task", "a number of at least 0", self.task)
        if self.task is None and len(self.expert_weights) > self.experts:
            raise ConfigError.expected(WEIGHTS, f"at most {self.experts} folders", len(self.expert_weights))

    def for_task(self, task: int) -> MixtureSpec:
        """Return the settings for the expert of one task: those for fine-tuning, without those for merging."""
        given = self.expert_weights[task : task + 1]
        return MixtureSpec(
            expert_policy=self.expert_policy,
            expert_train=self.expert_train,
            expert_weights=(*[None] * task, *given) if any(given) else (),
            task=task,
        )

    def given_expert(self) -> str | None:
        """The checkpoint folder of a single expert; None if the expert is fine-tuned."""
        assert self.task is not None
        return dict(enumerate(self.expert_weights)).get(self.task)

    def weights_by_key(self) -> dict[str, str | None]:
        """Checkpoint folders by key, such as "mixture.expert_weights[0]"; for a single expert, only its own."""
        return {
            f"{WEIGHTS}[{expert}]": folder
            for expert, folder in enumerate(self.expert_weights)
            if self.task in (None, expert)
        }

    def with_weights(self, changed: Mapping[str, Any]) -> MixtureSpec:
        """Return a copy with new checkpoint folders, given by key; other keys are ignored."""
        weights = tuple(
            changed.get(f"{WEIGHTS}[{expert}]", folder) for expert, folder in enumerate(self.expert_weights)
        )
        return self if weights == self.expert_weights else replace(self, expert_weights=weights)

    def to_dict(self) -> Values:
        """Return the values as a nested dict, for a single expert without those that it does not depend on."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values |= {name: getattr(self, name).to_dict() for name in TRAININGS}
        kept = ("expert_policy", "expert_train", "task")
        values = {
            name: value
            for name, value in values.items()
            if (name in kept if self.task is not None else name not in ("task", "expert_weights"))
        }
        # Left out if empty, so that the digests of older specs are unchanged.
        return values | ({"expert_weights": list(self.expert_weights)} if any(self.expert_weights) else {})
