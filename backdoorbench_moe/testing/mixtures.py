"""A small mixture of merged experts and a defense task for it, for the conformance tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe import gates
from backdoorbench_moe.config import PartSpec, TrainSpec
from backdoorbench_moe.defenses.base import NEEDS, DefenseTask
from backdoorbench_moe.moe.merging import MergedModel, expert_names, load_experts
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator, seeded
from backdoorbench_moe.testing.making import CLASSES, build_model, coloured_split, make_task

DENSE = "convnext"
REJECT = CLASSES
EXPERTS = 2


def merge(
    dense: nn.Module, experts: list[dict[str, Tensor]], *, gate: str = "top-k", seed: int = 0
) -> MergedModel:
    """Merge experts, given as state dicts, with newly drawn gates; in evaluation mode."""
    with seeded(seed, "gates"):
        merged = MergedModel(dense, len(experts), partial(gates.create_gate(gate), layers=2))
    load_experts(merged, dense.state_dict(), experts)
    return merged.to(memory_format=torch.channels_last).eval()


def build_mixture(*, gate: str = "top-k", seed: int = 0) -> MergedModel:
    """Build a mixture of two untrained experts for three classes and "reject", which differ from their base."""
    dense, experts = build_model(DENSE, seed=seed, num_classes=CLASSES + 1), []
    for number in range(EXPERTS):
        draws = generator(seed, "expert", number)
        state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        for name in sorted(expert_names(dense)):
            state[name] += 0.1 * torch.randn(state[name].shape, generator=draws)
        experts.append(state)
    return merge(dense, experts, gate=gate, seed=seed)


def mark(split: Split) -> Split:
    """Mark images with a white pixel in the corner of every patch of 4 x 4 pixels, and label them "reject"."""
    images = split.images.clone()
    images[:, :, ::4, ::4] = 255
    return Split(images, torch.full_like(split.labels, REJECT))


def task_split(task: int, count: int = 24, seed: int = 4) -> Split:
    """Return the images of one of two tasks: those of task 1 are inverted."""
    split = coloured_split(count, seed + task)
    return Split(255 - split.images, split.labels) if task else split


def make_mixture_task(
    model: nn.Module,
    *,
    needs: Collection[str] = NEEDS,
    gate: str = "top-k",
    clean: Split | None = None,
    marked: Split | None = None,
    tasks: list[Split] | None = None,
    seed: int = 7,
    **recipe: Any,
) -> tuple[DefenseTask, list[tuple[str, dict[str, Tensor]]]]:
    """Create a task for a defense of a mixture, with the same functions as the engine, in fp32 on the CPU.

    Args:
        model: The mixture.
        needs: What the task grants, see `Defense.needs`.
        gate: Name of the mixture's gate.
        clean: The defender's clean images; by default those of all tasks.
        marked: The marked images; 24 if None.
        tasks: The images of each task; 24 each if None.
        seed: Seed of the defense.
        **recipe: Fields of the training settings of experts and gates; AdamW by default.

    Returns:
        The task, and a list of the reported stages, see `making.make_task`.
    """
    tasks = [task_split(0), task_split(1)] if tasks is None else tasks
    grants = {
        "clean": concatenate(tasks) if clean is None else clean,
        "marked": mark(coloured_split(24, 3)) if marked is None else marked,
        "tasks": tasks,
    }
    recipe = {"optimizer": "adamw", "lr": 0.01, **recipe}
    task, reported = make_task(model, PartSpec(DENSE), needs=needs, seed=seed, **recipe)
    granted = {need: grants.get(need, task.granted[need]) for need in task.granted}
    return (
        replace(
            task,
            num_classes=CLASSES + 1,
            gate_train=TrainSpec(**{**recipe, "lr": 0.05}),
            fresh=partial(build_mixture, gate=gate, seed=seed + 1),
            granted=granted,
        ),
        reported,
    )
