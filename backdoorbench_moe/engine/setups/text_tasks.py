"""The tasks of a mixture of language models, defined by the text data set."""

from __future__ import annotations

import torch

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.engine.setups.base import TaskSplits
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.records import TaskFacts


class TextTasks(TaskSplits):
    """The texts of the tasks of one mixture.

    Args:
        spec: The spec of the mixture, or of one of its experts.
        texts: The data, on the device.

    Raises:
        ConfigError: The data do not have enough tasks.
    """

    def __init__(self, spec: RunSpec, texts: TextSet) -> None:
        mixture, known = spec.mixture, len(texts.tasks)
        assert mixture is not None
        self.spec, self.texts = spec, texts
        if mixture.task is None:
            if mixture.experts > known:
                expected = f"at most {known}, the tasks of {texts.name}"
                raise ConfigError.expected("mixture.experts", expected, mixture.experts)
            self.numbers = range(mixture.experts)
        else:
            if mixture.task >= known:
                raise ConfigError.expected("mixture.task", f"a task in 0..{known - 1}", mixture.task)
            self.numbers = range(mixture.task, mixture.task + 1)
        self.names = [texts.tasks[number].name for number in self.numbers]
        self.facts = [
            TaskFacts(
                task=number,
                name=texts.tasks[number].name,
                train_images=len(texts.tasks[number].train),
                test_images=len(texts.tasks[number].test),
            )
            for number in self.numbers
        ]

    def train(self, task: int) -> Split:
        """The training texts of a task."""
        return self.texts.tasks[task].train

    def tests(self) -> list[Split]:
        """The test texts of each task."""
        return [self.texts.tasks[number].test for number in self.numbers]

    def mixed(self, images_per_task: int | None) -> Split:
        """Training texts, an equal number of each task; see `TaskSplits.mixed`."""
        counts = self._counts(images_per_task)
        return concatenate([self._drawn(number, counts[number]) for number in self.numbers])

    def count_mixed(self, images_per_task: int | None) -> int:
        """Number of texts in `mixed`. Raises ConfigError if a task has fewer than `images_per_task` texts."""
        return sum(self._counts(images_per_task).values())

    def _counts(self, per_task: int | None) -> dict[int, int]:
        counts, total = {}, len(self.texts.train)
        for number in self.numbers:
            own = len(self.train(number))
            if per_task is not None and per_task > own:
                expected = (
                    f"1 to {own}, the number of texts of task {number} ({self.texts.tasks[number].name})"
                )
                raise ConfigError.expected("mixture.gate_images", expected, per_task)
            counts[number] = per_task or min(max(1, total // len(self.numbers)), own)
        return counts

    def _drawn(self, number: int, count: int) -> Split:
        """Draw texts of a task, and keep them in order."""
        split = self.train(number)
        order = torch.randperm(len(split), generator=generator(self.spec.seed, "mix", number))
        return split.take(order[:count].sort().values.to(split.labels.device))
