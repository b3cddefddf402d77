"""Training sets whose features are planted, for defenses that judge training images."""

from __future__ import annotations

from dataclasses import replace

import torch
from defense_tasks import make_task, used_model
from torch import Tensor

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.base import DefenseResult, DefenseTask

DEPTH = 256


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbered(start: int, stop: int) -> Tensor:
    """Images (n, 3, 32, 32) whose first two pixels are a number."""
    images, numbers = torch.zeros(stop - start, 3, 32, 32, dtype=torch.uint8), torch.arange(start, stop)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // DEPTH, numbers % DEPTH
    return images


def planted_task(
    vectors: Tensor, labels: Tensor, clean: Tensor | None = None, known: Tensor | None = None
) -> DefenseTask:
    """A task whose model sees these features in the training images, and others in the defender's clean ones.

    Args:
        vectors: (N, D), of the training images.
        labels: (N,), their labels.
        clean: (m, D), of the clean images; the first row of `vectors` if None.
        known: (m,), their labels.
    """
    clean, known = (vectors[:1], labels[:1]) if clean is None or known is None else (clean, known)
    table = torch.cat([vectors, clean])

    def features(_: object, images: Tensor) -> Tensor:
        return table[images[:, 0, 0, 0].long() * DEPTH + images[:, 0, 0, 1].long()]

    task, _ = make_task(used_model())
    granted = {
        "training-set": Split(numbered(0, len(vectors)), labels),
        "clean": Split(numbered(len(vectors), len(table)), known),
        "features": features,
    }
    return replace(task, num_classes=int(labels.max()) + 1, granted=granted)


def judged(name: str, task: DefenseTask, **options: object) -> DefenseResult:
    """Judge without training again."""
    return create_defense(name, retrain=False, **options)(task)
