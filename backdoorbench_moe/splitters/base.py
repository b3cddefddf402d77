"""The splitter interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from backdoorbench_moe.ops.images import Split


class Splitter(ABC):
    """The tasks that experts are made for, derived from one data set. Expert e is made for task e.

    A task has some of the images (`members`), and may transform them (`transform`) without changing their labels.
    Subclasses implement `names` and one of these two, or both. Users call an instance.

    Attributes:
        tiny: Options with which the conformance tests build the splitter.
        deviations: Conformance tests that the splitter is known to fail: the reason for each, by name of the test.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @final
    def __call__(self, split: Split, task: int, *, num_classes: int, seed: int) -> Split:
        """Return the images of one task.

        Args:
            split: Images (N, 3, H, W) uint8 and their labels, on any device.
            task: Number of the task, from 0.
            num_classes: Number of classes of the data.
            seed: The run's seed. The same seed gives the same images.

        Returns:
            New tensors (n, 3, H, W) uint8 and (n,) int64, on the same device, in the order of `split`.

        Raises:
            ConfigError: The task has no images.
            PluginError: The subclass did not return valid images.
        """
        raise NotImplementedError

    @abstractmethod
    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        """Return the names of all tasks that the splitter offers; a run with E experts uses the first E.

        Raises:
            ConfigError: The data have too few classes.
        """

    def check(self, num_experts: int, num_classes: int) -> None:  # noqa: B027
        """Check that there are tasks for all experts.

        Raises:
            ConfigError: There are not; the message names the option.
        """

    def members(self, labels: Tensor, task: int, *, num_classes: int, seed: int) -> Tensor:
        """Return which images belong to a task: all of them by default.

        Args:
            labels: (N,) int64, on the CPU.
            task: Number of the task.
            num_classes: Number of classes of the data.
            seed: The run's seed.

        Returns:
            (n,) int64 indices in ascending order, on the CPU.
        """
        return torch.arange(len(labels))

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Transform images of a task; by default they are returned as they are.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], on any device; they must not be written to.
            task: Number of the task.

        Returns:
            Images of the same shape, in [0, 1]. Each must depend on its own image alone.
        """
        return images
