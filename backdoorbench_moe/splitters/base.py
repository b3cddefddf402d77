"""The splitter interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, PluginError, ShapeError
from backdoorbench_moe.ops.checks import check_image_batch
from backdoorbench_moe.ops.images import Split, change_images


class Splitter(ABC):
    """Base class of splitters, which derive tasks from one data set. Expert e is trained on task e.

    A task consists of some of the images (`members`), and may transform them (`transform`) without changing their
    labels. Subclasses implement `names`, and `members` or `transform` or both. Users call an instance.

    Task e must not depend on the number of experts, so that runs with different numbers can share experts.

    Attributes:
        tiny: Options with which the conformance tests build the splitter.
        deviations: Reasons for the conformance tests that the splitter is known to fail, by name of the test.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @final
    def __call__(
        self, split: Split, task: int, *, num_classes: int, seed: int, training: bool = False
    ) -> Split:
        """Return the images of one task.

        Args:
            split: Images (N, 3, H, W) uint8 and their labels, on any device. They are not modified.
            task: Number of the task, from 0.
            num_classes: Number of classes of the data, without an extra class for images that a policy rejects.
            seed: The run's seed. The same seed gives the same images.
            training: Whether the images are for training the task's expert. A splitter may then return fewer images
                than for a test.

        Returns:
            New tensors (n, 3, H, W) uint8 and (n,) int64, on the same device, in the order of `split`.

        Raises:
            ConfigError: There is no such task, or it has no images.
            ShapeError: `split` has the wrong shape or type.
            PluginError: The subclass did not return valid indices or images.
        """
        indices = self.find_members(
            split.labels, task, num_classes=num_classes, seed=seed, training=training
        ).to(split.images.device)
        return Split(self.transform_images(split.images[indices], task), split.labels[indices])

    @final
    def find_members(
        self, labels: Tensor, task: int, *, num_classes: int, seed: int, training: bool = False
    ) -> Tensor:
        """Call `members` to find the images of a task, and check the result.

        Args:
            labels: (N,) int64, on any device.
            task: Number of the task, from 0.
            num_classes: Number of classes of the data.
            seed: The run's seed.
            training: See `__call__`.

        Returns:
            (n,) int64 indices in ascending order, n > 0, on the CPU.

        Raises:
            ConfigError: There is no such task, or it has no images.
            ShapeError: `labels` has the wrong shape or type.
            PluginError: The subclass did not return such indices.
        """
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
            raise ShapeError(f"labels: expected an int64 tensor (N,), got {_describe(labels)}")
        names = self.names(num_classes, seed)
        if task not in range(len(names)):
            raise ConfigError.expected("task", f"the number of a task in 0..{len(names) - 1}", task)
        indices = self.members(labels.cpu(), task, num_classes=num_classes, seed=seed, training=training)
        self._check_indices(indices, len(labels))
        if not len(indices):
            raise ConfigError(
                f"splitter: expected images of task {task} ({names[task]}), got none of {len(labels)}"
            )
        return indices

    @final
    def transform_images(self, images: Tensor, task: int) -> Tensor:
        """Call `transform` on images of a task, check the result and round it to 8 bits.

        Args:
            images: (N, 3, H, W) uint8, on any device. They are not modified.
            task: Number of an existing task.

        Returns:
            New images of the same shape, uint8, on the same device.

        Raises:
            ShapeError: `images` has the wrong shape or type.
            PluginError: The subclass did not return images of this shape with finite values in [0, 1].
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise ShapeError(f"images: expected a uint8 tensor (N, 3, H, W), got {_describe(images)}")
        # Under autocast, convolutions would be computed in 16 bits, which is too coarse for 256 levels.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return change_images(images, lambda chunk, _: self._checked(self.transform(chunk, task), chunk))

    @abstractmethod
    def names(self, num_classes: int, seed: int) -> tuple[str, ...]:
        """Return the names of all tasks of the splitter; a run with E experts uses the first E.

        Raises:
            ConfigError: The data have too few classes.
        """

    def check(self, num_experts: int, num_classes: int, seed: int) -> None:
        """Check that there is a task for each expert. By default, there may be more tasks than experts.

        Raises:
            ConfigError: There are too few tasks, or the data have too few classes; the message names the option.
        """
        if num_experts > (most := len(self.names(num_classes, seed))):
            raise ConfigError.expected(
                "mixture.experts", f"at most {most}, the tasks of splitter {type(self).__name__}", num_experts
            )

    def members(self, labels: Tensor, task: int, *, num_classes: int, seed: int, training: bool) -> Tensor:
        """Return the indices of the images of a task; by default, all images.

        Args:
            labels: (N,) int64, on the CPU.
            task: Number of the task.
            num_classes: Number of classes of the data.
            seed: The run's seed.
            training: See `__call__`.

        Returns:
            (n,) int64 indices in ascending order, on the CPU.

        Raises:
            ConfigError: The task has no images; the message names the option.
        """
        return torch.arange(len(labels))

    def transform(self, images: Tensor, task: int) -> Tensor:
        """Transform images of a task; by default, return them unchanged.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], on any device. They must not be modified.
            task: Number of the task.

        Returns:
            Images of the same shape, in [0, 1]. Each must depend only on the corresponding input image.
        """
        return images

    def _check_indices(self, indices: object, count: int) -> None:
        expected = (
            f"splitter {type(self).__name__}: expected members as ascending int64 indices below {count} "
            "on the CPU"
        )
        if not isinstance(indices, Tensor) or (indices.dtype, indices.ndim) != (torch.int64, 1):
            raise PluginError(f"{expected}, got {_describe(indices)}")
        if indices.device.type != "cpu":
            raise PluginError(f"{expected}, got them on {indices.device}")
        if len(indices) and not (indices[0] >= 0 and indices[-1] < count and (indices.diff() > 0).all()):
            raise PluginError(f"{expected}, got {indices.tolist()[:10]}")

    def _checked(self, changed: Tensor, images: Tensor) -> Tensor:
        try:
            check_image_batch(changed, f"output of splitter {type(self).__name__}", like=images, wait=True)
        except ShapeError as error:
            raise PluginError(str(error)) from error
        return changed


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
