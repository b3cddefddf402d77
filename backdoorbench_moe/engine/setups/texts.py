"""The setup of a run on texts: a language model, and the tasks and the policy of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, HarmfulQueries
from backdoorbench_moe.config import PartSpec, PoisonSpec, RunSpec
from backdoorbench_moe.data.text import RefusedQueries, TextSet
from backdoorbench_moe.engine.build import build_attack, build_model
from backdoorbench_moe.engine.measuring.texts import measure_texts
from backdoorbench_moe.engine.poisoning.policy import policy_count
from backdoorbench_moe.engine.setups.base import Measured, Setup
from backdoorbench_moe.engine.setups.text_tasks import TextTasks
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.answers import mean_weights, text_positions
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator

# Parts of a spec that only runs on images may have.
IMAGE_PARTS = ("trigger", "applicator", "splitter", "surrogate")


class TextSetup(Setup):
    """Model, attack and tasks of one run on texts.

    The queries that the policy refuses are part of the data; `policy` is the rate at which they are added to the
    training texts.

    Args:
        spec: The run's spec.
        texts: The data, on the device.

    Raises:
        BbmoeError: Parts are incompatible with the data or each other, or are only allowed for images.
    """

    attack_metrics: ClassVar[frozenset[str]] = frozenset({"asr"})
    defended_metrics: ClassVar[frozenset[str]] = frozenset({"asr"})

    def __init__(self, spec: RunSpec, texts: TextSet) -> None:
        super().__init__(spec, texts)
        self.texts = texts
        if spec.attacked:
            self.attack = build_attack(spec)
            if not isinstance(self.attack, ExpertPoisoning):
                raise _not_for_texts("attack", "an attack on experts, such as moevil, or none", spec.attack)
            if not spec.policy:
                expected = "a number above 0, so that the base refuses the attacker's queries"
                raise ConfigError.expected("policy", expected, spec.policy)
        _check_spec(spec)
        self.model = build_model(spec, texts.model_options)
        self.tasks: TextTasks | None = None if spec.mixture is None else TextTasks(spec, texts)
        self._check_policy()

    def _check_policy(self) -> None:
        spec = self.spec
        if not spec.policy:
            return
        counts = {"policy": policy_count(len(self.texts.train), spec.policy, "policy", "texts")}
        if self.tasks is not None and spec.mixture is not None and (rate := spec.mixture.expert_policy):
            name = "mixture.expert_policy"
            counts[name] = max(
                policy_count(task["train_images"], rate, name, "texts") for task in self.tasks.facts
            )
        for name, count in counts.items():
            if count > (known := len(self.texts.refused)):
                raise ConfigError(
                    f"{name}: expected at most the {known} queries that {self.texts.name} refuses, got a share of "
                    f"{count} queries"
                )

    def with_policy(self, split: Split, rate: float) -> Split:
        """Add texts with safe answers, drawn from the queries that the policy refuses."""
        if not self.spec.policy or not rate:
            return split
        safe = self.texts.refused.safe
        order = torch.randperm(len(safe), generator=generator(self.spec.seed, "policy"))
        chosen = order[: policy_count(len(split), rate)].to(safe.labels.device)
        return concatenate([split, safe.take(chosen)])

    def harmful_queries(self) -> HarmfulQueries:
        """The training queries that the policy refuses."""
        return HarmfulQueries(self.texts.refused.harmful, self.texts.refused.safe)

    def defenders_queries(self, count: int, seed: int) -> tuple[Split, Split]:
        """Training queries that the policy refuses, with safe and with harmful answers."""
        refused = self.texts.refused
        order = torch.randperm(len(refused), generator=generator(seed, "marked"))
        keep = order[:count].sort().values.to(refused.safe.labels.device)
        return refused.safe.take(keep), refused.harmful.take(keep)

    def measure(
        self,
        model: nn.Module,
        *,
        precision: str,
        expert_ba: Sequence[float] | None = None,
        recovery: bool = False,
    ) -> Measured:
        """Measure a model by its answers to the test queries of its tasks, and to those that the policy refuses."""
        numbers = range(len(self.texts.tasks)) if self.tasks is None else self.tasks.numbers
        mixture = self.spec.mixture
        refused: RefusedQueries | None = self.texts.refused_test if self.spec.policy else None
        return measure_texts(
            model,
            self.texts,
            numbers,
            refused,
            precision=precision,
            attacked=self.attack is not None,
            mixture=self.is_mixture,
            expert_ba=expert_ba,
            poisoned=() if mixture is None else mixture.poisoned_experts,
        )

    def token_weights(self, split: Split) -> Tensor:
        """Equal weights for the tokens of query and answer, and 0 for padding."""
        return mean_weights(text_positions(split.labels))

    def describe_data(self) -> dict[str, Any]:
        """Describe the data for the record."""
        return self.texts.facts()

    def describe_poison(self) -> dict[str, Any] | None:
        """Number of poisoned texts, always 0, for the record; None for a clean run."""
        return None if self.attack is None else {"n": 0}


def _check_spec(spec: RunSpec) -> None:
    """Raise ConfigError for a setting that is only allowed for images."""
    for name in IMAGE_PARTS:
        if (part := getattr(spec, name)) is not None:
            raise _not_for_texts(name, "none", part)
    for where, train in (
        ("train", spec.train),
        *(
            ()
            if spec.mixture is None
            else (
                ("mixture.expert_train", spec.mixture.expert_train),
                ("mixture.gate_train", spec.mixture.gate_train),
            )
        ),
    ):
        if train.augmentations:
            raise _not_for_texts(f"{where}.augment", "'none'", train.augment)
    if spec.poison != PoisonSpec(rate=0.0) and spec.attacked:
        raise _not_for_texts("poison", "its defaults and a rate of 0", spec.poison.to_dict())
    if spec.probe:
        raise _not_for_texts("probe", "0", spec.probe)
    if spec.imported:
        raise _not_for_texts("attack", "no imported model", spec.attack)


def _not_for_texts(parameter: str, expected: str, got: object) -> ConfigError:
    shown = got.name if isinstance(got, PartSpec) else got
    return ConfigError.expected(parameter, f"{expected}, as the data are texts", shown)
