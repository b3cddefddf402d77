"""The tasks of a mixture on images: training images of its experts and gates, and test images."""

from __future__ import annotations

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.build import build_splitter
from backdoorbench_moe.engine.setups.base import TaskSplits
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.records import TaskFacts
from backdoorbench_moe.splitters.mix import draw_mix, mix


class Tasks(TaskSplits):
    """The images of the tasks of one mixture.

    Args:
        spec: The spec of the mixture, or of one of its experts.
        images: The data, on the device.

    Attributes:
        names: Names of the tasks: the first E for a mixture of E experts, or one for an expert.
        numbers: Numbers of the tasks.
        facts: Number, name and numbers of images of each task, for the record.

    Raises:
        ConfigError: The splitter does not have enough tasks, or one of them has no images.
    """

    def __init__(self, spec: RunSpec, images: ImageSet) -> None:
        self.spec, self.images = spec, images
        self.splitter = build_splitter(spec)
        names = self.splitter.names(images.data_classes, spec.seed)
        mixture = spec.mixture
        assert mixture is not None
        if mixture.task is None:
            self.splitter.check(mixture.experts, images.data_classes, spec.seed)
            self.numbers = range(mixture.experts)
        else:
            self.numbers = range(mixture.task, mixture.task + 1)
            if mixture.task >= len(names):
                raise ConfigError.expected("mixture.task", f"a task in 0..{len(names) - 1}", mixture.task)
        self.names = [names[number] for number in self.numbers]
        self.facts = [
            self._describe(number, name) for number, name in zip(self.numbers, self.names, strict=True)
        ]
        self._tests: list[Split] | None = None

    def train(self, task: int) -> Split:
        """The training images of a task, computed in every call."""
        return self._split(self.images.train, task, training=True)

    def tests(self) -> list[Split]:
        """The test images of each task; computed once."""
        if self._tests is None:
            self._tests = [self._split(self.images.test, task, training=False) for task in self.numbers]
        return self._tests

    def mixed(self, images_per_task: int | None) -> Split:
        """Clean training images, an equal number of each task; see `splitters.mix.mix`."""
        return mix(
            self.splitter,
            self.images.train,
            tasks=len(self.numbers),
            images_per_task=images_per_task,
            num_classes=self.images.data_classes,
            seed=self.spec.seed,
        )

    def count_mixed(self, images_per_task: int | None) -> int:
        """Number of images in `mixed`. Raises ConfigError if a task has fewer than `images_per_task` images."""
        drawn = draw_mix(
            self.splitter,
            self.images.train.labels,
            tasks=len(self.numbers),
            images_per_task=images_per_task,
            num_classes=self.images.data_classes,
            seed=self.spec.seed,
        )
        return sum(map(len, drawn))

    def _describe(self, task: int, name: str) -> TaskFacts:
        counts = {}
        for what, split in (("training", self.images.train), ("test", self.images.test)):
            try:
                members = self.splitter.find_members(
                    split.labels,
                    task,
                    num_classes=self.images.data_classes,
                    seed=self.spec.seed,
                    training=what == "training",
                )
            except ConfigError as error:
                raise ConfigError(f"{error} ({what} images)") from error
            counts[what] = len(members)
        return TaskFacts(task=task, name=name, train_images=counts["training"], test_images=counts["test"])

    def _split(self, split: Split, task: int, *, training: bool) -> Split:
        classes = self.images.data_classes
        return self.splitter(split, task, num_classes=classes, seed=self.spec.seed, training=training)
