"""The mix of clean images of all tasks on which a provider trains gates."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.splitters.base import Splitter


def mix(
    splitter: Splitter,
    split: Split,
    *,
    tasks: int,
    images_per_task: int | None,
    num_classes: int,
    seed: int,
) -> Split:
    """Draw images of every task.

    Images are drawn from all members of a task without replacement; they need not be images that the experts were
    trained on. An image may be drawn for several tasks. For a given number of images per task, the images of a task do
    not depend on the number of tasks.

    Departure: the gates of MoEvil are trained on 1,000 samples of each task and 1,000 general samples, which image
    data sets do not have.

    Args:
        splitter: The tasks.
        split: Clean training images (N, 3, H, W) uint8 and their labels, on any device.
        tasks: Number of tasks E, at least 1.
        images_per_task: Number of images of each task, at least 1. If None, N // E and at least 1, or all members of a
            task that has fewer.
        num_classes: Number of classes of the data.
        seed: The run's seed.

    Returns:
        New tensors on the same device: the transformed images of task 0 in the order of `split`, then those of task 1,
        and so on.

    Raises:
        ConfigError: A task does not exist, has no images, or has fewer than `images_per_task`.

    Source:
        MoEvil (Kim et al., ACSAC 2025), §6.2.
    """
    drawn = draw_mix(
        splitter,
        split.labels,
        tasks=tasks,
        images_per_task=images_per_task,
        num_classes=num_classes,
        seed=seed,
    )
    parts = []
    for task, indices in enumerate(drawn):
        place = indices.to(split.images.device)
        parts.append(Split(splitter.transform_images(split.images[place], task), split.labels[place]))
    return concatenate(parts)


def draw_mix(
    splitter: Splitter,
    labels: Tensor,
    *,
    tasks: int,
    images_per_task: int | None,
    num_classes: int,
    seed: int,
) -> list[Tensor]:
    """Draw the images of `mix` without transforming them.

    Args:
        splitter: The tasks.
        labels: (N,) int64, the labels of the training images, on any device.
        tasks: Number of tasks E, at least 1.
        images_per_task: Number of images of each task; see `mix`.
        num_classes: Number of classes of the data.
        seed: The run's seed.

    Returns:
        For each task, (n,) int64 indices of its images in ascending order, on the CPU.

    Raises:
        ConfigError: A task does not exist, has no images, or has fewer than `images_per_task`.
    """
    drawn = []
    for task in range(tasks):
        members = splitter.find_members(labels, task, num_classes=num_classes, seed=seed)
        count = images_per_task
        if count is None:
            count = min(max(1, len(labels) // tasks), len(members))
        elif not 1 <= count <= len(members):
            name = splitter.names(num_classes, seed)[task]
            expected = f"1 to {len(members)}, the number of images of task {task} ({name})"
            raise ConfigError.expected("mixture.gate_images", expected, count)
        drawn.append(_draw(members, count, seed, task))
    return drawn


def _draw(members: Tensor, count: int, seed: int, task: int) -> Tensor:
    """Draw members of a task, in ascending order."""
    order = torch.randperm(len(members), generator=generator(seed, "mix", task))
    return members[order[:count].sort().values]
