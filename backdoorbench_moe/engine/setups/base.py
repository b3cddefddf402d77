"""What a run is made of, whether its data are images or texts."""

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

# Metrics, and the gate shares of a mixture layer by layer; none of any other model.
Measured = tuple[Metrics, list[GateShares]]


class TaskSplits(ABC):
    """The tasks of a mixture: what its experts and gates are trained on, and what it is measured on.

    Attributes:
        names: Names of the tasks: of the first E for a mixture of E experts, and of one for an expert.
        numbers: Their numbers.
        facts: Number, name and numbers of images, or texts, of each, for the record.
    """

    names: list[str]
    numbers: range
    facts: list[TaskFacts]

    @abstractmethod
    def train(self, task: int) -> Split:
        """The training images of a task."""

    @abstractmethod
    def tests(self) -> list[Split]:
        """The test images of each task; they are made once."""

    @abstractmethod
    def mixed(self, images_per_task: int | None) -> Split:
        """Clean training images of all tasks, equally many of each, on which gates are trained.

        Args:
            images_per_task: How many of each; None for 1 / E of all, or all of a task that has fewer.
        """

    @abstractmethod
    def count_mixed(self, images_per_task: int | None) -> int:
        """Number of images of `mixed`. Raises ConfigError if a task has fewer than `images_per_task`."""


class Setup(ABC):
    """The parts of one run, which are built once and fit each other and the data.

    Args:
        spec: The run's spec.
        data: The data, on the device. If they are images, those of a policy have one more class, "reject".

    Attributes:
        model: The model, its weights drawn from the run's seed.
        attack: Who the attacker is; None for a clean run.
        tasks: The tasks of a mixture, or that of an expert; None for any other run.
        stamper: Trigger and applicator; None for a run without a trigger, and for one on texts.
        plan: Which training images the attacker changes; None for a clean run, and for one on texts.
        attack_metrics: The metrics that every attacked run has.
        defended_metrics: Those that every attacked run has which was defended. The target rate is not measured together
            with an input filter.
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
        """Number of classes; 0 where the data are texts."""
        return self.data.model_options.get("num_classes", 0)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels; 0 where the data are texts."""
        return self.data.model_options.get("image_size", 0)

    @property
    def is_mixture(self) -> bool:
        """Whether the run merges experts, or defends a model that was merged."""
        return self.spec.gate is not None

    @abstractmethod
    def with_policy(self, split: Split, rate: float) -> Split:
        """Add images that are to be rejected, or texts to be refused, if there is a policy.

        Args:
            split: The images that a model is trained on.
            rate: Number of images to add as a share of their number; 0 for none.
        """

    @abstractmethod
    def harmful_queries(self) -> HarmfulQueries:
        """What an attacker on experts has of harmful queries."""

    @abstractmethod
    def defenders_queries(self, count: int, seed: int) -> tuple[Split, Split | None]:
        """Training queries of a policy that a defender holds, with safe answers, and with unsafe ones of texts.

        Args:
            count: How many; of texts, all of them if there are fewer.
            seed: Seed of the draw.

        Returns:
            Images that bear the mark with the label "reject", and None: what an attacker wants them to be called, the
            defender does not know. Or the same texts twice, with both answers of the data.
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
            model: The model of the run, or one of the same form, such as its clean twin's.
            precision: "fp32" or "bf16".
            expert_ba: Of a mixture, the accuracy of each task's benign expert on its own task, in percent; None to
                leave out what it is compared with.
            recovery: Whether to measure the accuracy on triggered images (RA), too.
        """

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """What the record says of the data; see `records.Record.data`."""

    def describe_tasks(self) -> list[TaskFacts]:
        """Number, name and numbers of images of each task of a mixture, for the record."""
        return [] if self.tasks is None else self.tasks.facts

    def describe_parts(self) -> dict[str, Any]:
        """Return the values that the options of the parts took, for the record."""
        parts = {"model": describe(self.model)}
        if self.attack is not None and (options := describe(self.attack)):
            parts["attack"] = options
        if self.spec.gate is not None:
            parts["gate"] = describe(build_gate(self.spec))
        return parts

    @abstractmethod
    def describe_poison(self) -> dict[str, Any] | None:
        """How many images the attacker changes, for the record; None for a clean run."""

    @abstractmethod
    def token_weights(self, split: Split) -> Tensor | None:
        """The weights with which the tokens of each text count, (N, T) float32; None for images, all of whose do."""
