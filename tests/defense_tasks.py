"""What a defense is given, made by hand for tests."""

from __future__ import annotations

import torch
from tiny import tiny_spec
from torch import Tensor, nn

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.models import create_model
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing import making
from backdoorbench_moe.testing.making import CPU, changed, coloured_split, copies

__all__ = ["CPU", "changed", "copies"]

SMALL: dict[str, dict[str, object]] = {
    "pmoe": {"widen_factor": 1, "moe_channels": 8, "expert_channels": 5, "gate_std": 1.0},
    "wide_resnet": {"widen_factor": 1},
    "preact_resnet18": {"width": 8},
    "vgg16_bn": {"width": 4},
    "timm:test_resnet": {},
}


def used_model(name: str = "pmoe", *, seed: int = 0) -> nn.Module:
    """A small model that has seen a batch, so that its norms hold statistics; in evaluation mode."""
    with seeded(seed, "init"):
        model = create_model(name, num_classes=3, **SMALL.get(name, {}))
    return making.settle(model).to(memory_format=torch.channels_last)


def trained_model(*, seed: int = 0) -> tuple[nn.Module, Split]:
    """A small pMoE that has learned something, and images with its own answers, of which no class has most.

    Without one of its experts it gets some of them wrong, and without another, others; without the second, which
    the head hardly hears, next to none: whatever the rounding, that one is missed least.
    """
    model = used_model(seed=seed)
    task, _ = make_task(model, clean=held_images(96), lr=0.02, optimizer="adamw")
    task.tune(model, task.clean, epochs=4)
    noise = torch.randint(0, 256, (60, 3, 32, 32), generator=torch.Generator().manual_seed(9)).byte()
    with torch.no_grad():
        model.head.weight[:, 5:10] *= 0.01
        model.head.bias -= logits(model, noise, precision="fp32").mean(0)
    return model, Split(noise, logits(model, noise, precision="fp32").argmax(1))


def held_images(count: int = 24) -> Split:
    """Some clean images of the tiny data set, to own."""
    return coloured_split(count, 1)


def make_task(
    model: nn.Module, *, name: str = "pmoe", clean: Split | None = None, seed: int = 7, **recipe: object
) -> tuple[DefenseTask, list[tuple[str, dict[str, Tensor]]]]:
    """A task as the engine makes it for a model of `SMALL`, and the list that reported stages come to lie in."""
    return making.make_task(model, PartSpec(name, SMALL.get(name, {})), clean=clean, seed=seed, **recipe)


PRUNING = {"name": "fine-pruning", "ratio": 0.25, "clean_fraction": 0.5, "epochs": 1}
TUNING = {"name": "fine-tuning", "clean_fraction": 0.5, "epochs": 1}


def defended_spec(*parts: dict[str, object], **values: object) -> RunSpec:
    """A tiny spec with these defenses."""
    return tiny_spec(defenses=list(parts or [PRUNING]), **values)


def outcome(run: Run) -> tuple[object, ...]:
    """What must be equal, bit for bit, between two ways to the same run."""
    tensors, _ = run.folder.load_tensors()
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        for rows in (run.record.history, run.record.stages)
    ]
    return run.record.metrics, timeless, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
