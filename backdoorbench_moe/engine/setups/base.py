"""Base classes of setups, the parts of a run on images or texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.expert_poisoning import HarmfulQueries
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Material, Split, as_images
from backdoorbench_moe.engine.build import Stamper, build_gate, describe
from backdoorbench_moe.engine.measuring.evaluate import Metrics
from backdoorbench_moe.records import GateShares, TaskFacts

# Metrics, and the gate shares of each layer of a mixture; no gate shares for any other model.
Measured = tuple[Metrics, list[GateShares]]


class TaskSplits(ABC):
    """The tasks of a mixture: training data of its experts and gates, and test data.

    Attributes:
        names: Names of the tasks: the first E for a mixture of E experts, or one for an expert.
        numbers: Numbers of the tasks.
        facts: Number, name, and numbers of images or texts of each task, for the record.
    """

    names: list[str]
    numbers: range
    facts: list[TaskFacts]

    @abstractmethod
    def train(self, task: int) -> Split:
        """The training images of a task."""

    @abstractmethod
    def tests(self) -> list[Split]:
        """The test images of each task."""

    @abstractmethod
    def mixed(self, images_per_task: int | None) -> Split:
        """Clean training images for the gates, an equal number of each task.

        Args:
            images_per_task: Number of images per task; None for 1 / E of the training set, or all images of a task that
                has fewer.
        """

    @abstractmethod
    def count_mixed(self, images_per_task: int | None) -> int:
        """Number of images in `mixed`. Raises ConfigError if a task has fewer than `images_per_task` images."""


class Setup(ABC):
    """The parts of one run, built and checked against each other and the data.

    Args:
        spec: The run's spec.
        data: The data, on the device. With a policy, images have the additional class "reject".

    Attributes:
        model: The model, with weights initialised from the run's seed.
        attack: The attack; None for a clean run.
        tasks: The tasks of a mixture, or that of an expert; None for any other run.
        stamper: Trigger and applicator; None for a run without a trigger or on texts.
        plan: Which training images the attacker changes; None for a clean run or a run on texts.
        attack_metrics: The metrics of every attacked run.
        defended_metrics: The metrics of every attacked run after a defense. The target rate is not included, since it
            is not measured with an input filter.
    """

    model: nn.Module
    attack_metrics: ClassVar[frozenset[str]] = frozenset({"asr", "target_rate"})
    defended_metrics: ClassVar[frozenset[str]] = frozenset({"asr", "ra"})

    def __init__(self, spec: RunSpec, data: Material) -> None:
        self.spec, self.data = spec, data
        self.attack: Attack | None = None
        self.tasks: TaskSplits | None = None
        self.stamper: Stamper | None = None
        self.plan: PoisonPlan | None = None

    @property
    def images(self) -> ImageSet:
        """The data, if they are images. Raises ConfigError for texts."""
        return as_images(self.data)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for texts."""
        return self.data.model_options.get("num_classes", 0)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels; 0 for texts."""
        return self.data.model_options.get("image_size", 0)

    @property
    def is_mixture(self) -> bool:
        """Whether the run merges experts, or defends a model that was merged."""
        return self.spec.gate is not None

    @abstractmethod
    def with_policy(self, split: Split, rate: float) -> Split:
        """Add images to reject or texts to refuse, if there is a policy.

        Args:
            split: The training images or texts.
            rate: Number of images or texts to add, as a share of the size of `split`; 0 for none.
        """

    @abstractmethod
    def harmful_queries(self) -> HarmfulQueries:
        """The harmful training queries of an attacker on experts."""

    @abstractmethod
    def defenders_queries(self, count: int, seed: int) -> tuple[Split, Split | None]:
        """The defender's training queries that the policy rejects, with safe and, for texts, unsafe answers.

        Args:
            count: Number of queries; if there are fewer texts, all of them.
            seed: Seed of the draw.

        Returns:
            For images, the marked images with the label "reject", and None, since the defender does not know the
            attacker's class. For texts, the same texts with the safe and with the harmful answers.
        """

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        *,
        precision: str,
        expert_ba: Sequence[float] | None = None,
        recovery: bool = False,
    ) -> Measured:
        """Measure a model, which is left in evaluation mode.

        Args:
            model: The model of the run, or one with the same architecture, such as that of its clean twin.
            precision: "fp32" or "bf16".
            expert_ba: For a mixture, the accuracy of each task's benign expert on its own task, in percent; None to
                leave out the comparison with the experts.
            recovery: Whether to measure the accuracy on triggered images (RA), too.
        """

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """Describe the data for the record; see `records.Record.data`."""

    def describe_tasks(self) -> list[TaskFacts]:
        """Number, name and numbers of images of each task of a mixture, for the record."""
        return [] if self.tasks is None else self.tasks.facts

    def describe_parts(self) -> dict[str, Any]:
        """Return the values of the parts' options, for the record."""
        parts = {"model": describe(self.model)}
        if self.attack is not None and (options := describe(self.attack)):
            parts["attack"] = options
        if self.spec.gate is not None:
            parts["gate"] = describe(build_gate(self.spec))
        return parts

    @abstractmethod
    def describe_poison(self) -> dict[str, Any] | None:
        """Number of images that the attacker changes, for the record; None for a clean run."""

    @abstractmethod
    def token_weights(self, split: Split) -> Tensor | None:
        """Weights of the tokens of each text for averages, (N, T) float32; None for images, whose tokens all count."""
