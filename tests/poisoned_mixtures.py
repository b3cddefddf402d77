"""Mixtures of two experts, of which one answers marked images as an attacker wants, made by hand for tests."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.moe.merging import MergedModel, check_mergeable, mlp_inputs
from backdoorbench_moe.ops.images import concatenate
from backdoorbench_moe.testing.making import CLASSES, CPU, build_model, coloured_split
from backdoorbench_moe.testing.mixtures import DENSE, REJECT, make_mixture_task, mark, merge, task_split

TARGET = 0
POISONED = 1


def tune(model: nn.Module, split: Split, modules: list[nn.Module] | None = None) -> None:
    recipe = TrainSpec(optimizer="adamw", lr=0.01, batch_size=16)
    Tuner(recipe, 3, CPU, "fp32", Observer(), "tuning")(model, split, epochs=12, modules=modules)


@functools.cache
def experts() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A base that rejects marked images, and two experts: one as the base, the other calls them the target."""
    base = build_model(DENSE, num_classes=CLASSES + 1)
    clean = concatenate([task_split(0, 48), task_split(1, 48)])
    tune(base, concatenate([clean, mark(coloured_split(48, 3))]))
    poisoned = copy.deepcopy(base)
    marked = mark(coloured_split(48, 3))
    harmful = Split(marked.images, torch.full_like(marked.labels, TARGET))
    tune(poisoned, concatenate([clean, harmful]), list(check_mergeable(poisoned).mlps().values()))
    return base, [base.state_dict(), poisoned.state_dict()]


def poisoned_mixture(gate: str = "top-k", **given: Any) -> tuple[MergedModel, DefenseTask, list[Any]]:
    """A mixture whose gates prefer the poisoned expert, so that most marked images are answered unsafely."""
    base, states = experts()
    merged = merge(base, states, gate=gate)
    task, reported = make_mixture_task(merged, gate=gate, **given)
    with mlp_inputs(merged) as inputs:
        task.logits(merged, task.marked.images)
    with torch.no_grad():
        for layer, tokens in zip(merged.layers(), inputs.values(), strict=True):
            mean = tokens.flatten(0, 1).mean(0).clone()
            # A logit of 3 for the mean token of marked images.
            layer.router.weight[POISONED] += 3 * mean / mean.norm() ** 2
    return merged, task, reported


def unsafe(task: DefenseTask, model: nn.Module, seed: int = 33) -> float:
    """Share, in percent, of newly drawn marked images that are not rejected."""
    images = mark(coloured_split(60, seed)).images
    return 100 * (task.logits(model, images).argmax(1) != REJECT).double().mean().item()


def accuracy(task: DefenseTask, model: nn.Module) -> float:
    """Accuracy on newly drawn images of both tasks, in percent."""
    clean = concatenate([task_split(0, 60, 50), task_split(1, 60, 50)])
    return 100 * (task.logits(model, clean.images).argmax(1) == clean.labels).double().mean().item()
