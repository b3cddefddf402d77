"""Small parts, images and defense tasks for the conformance tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import PartSpec, PoisonSpec, TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import NEEDS, DefenseTask
from backdoorbench_moe.engine.build import fresh_model
from backdoorbench_moe.engine.inference import features, logits, losses, routings
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.ops.seeding import seeded

CLASSES, IMAGE_SIZE = 3, 32
CPU = torch.device("cpu")


def tiny_options(kind: str, name: str) -> dict[str, object]:
    """Return the options in a part's `tiny`, without an option that is set by a name "family:argument"."""
    part = REGISTRIES[kind].lookup(name)
    given = getattr(part, "name_argument", None) if ":" in name else None
    return {option: value for option, value in getattr(part, "tiny", {}).items() if option != given}


def make(kind: str, name: str, **options: object) -> Any:
    """Build a small part. `options` take precedence over those in its `tiny`."""
    return REGISTRIES[kind].create(name, {**tiny_options(kind, name), **options})


def make_attack(name: str, *, poison: PoisonSpec, **options: object) -> Any:
    """Build a small attack. `options` take precedence over those in its `tiny`."""
    return REGISTRIES["attack"].create(name, {**tiny_options("attack", name), **options}, {"poison": poison})


def build_model(
    name: str, *, seed: int = 0, num_classes: int = 10, image_size: int = IMAGE_SIZE
) -> nn.Module:
    """Build a small model with weights drawn from `seed`."""
    given = {"num_classes": num_classes, "image_size": image_size}
    with seeded(seed, "init"):
        return REGISTRIES["model"].create(name, tiny_options("model", name), given)


def settle(model: nn.Module) -> nn.Module:
    """Run three forward passes in training mode, so that batch norms have running statistics.

    Returns:
        The same model, in evaluation mode.
    """
    images = batch(16, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        for _ in range(3):
            model.train()(images)
    return model.eval()


def used_model(name: str, *, seed: int = 0) -> nn.Module:
    """Build a small model of three classes with running statistics (see `settle`), but without training.

    Returns:
        The model, in evaluation mode and in the memory format channels_last.
    """
    model = build_model(name, seed=seed, num_classes=CLASSES)
    return settle(model).to(memory_format=torch.channels_last)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values of a shape, uniform in [0, 1). Every call with this shape returns the same values."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def coloured_split(count: int, seed: int) -> Split:
    """Draw noisy images of three classes that differ in colour, (count, 3, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 128, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 100
    return Split(images, labels)


def make_task(
    model: nn.Module,
    made_by: PartSpec,
    *,
    needs: Collection[str] = NEEDS,
    clean: Split | None = None,
    seed: int = 7,
    **recipe: Any,
) -> tuple[DefenseTask, list[tuple[str, dict[str, Tensor]]]]:
    """Make a task for a defense, with the same functions as the engine, in fp32 on the CPU.

    Args:
        model: The model to defend.
        made_by: Name and options that the model was built from.
        needs: Names of the data and functions that the task provides, see `Defense.needs`; all by default.
        clean: The images that the defender holds; 24 images if None.
        seed: Seed of the defense.
        **recipe: Fields of the task's `TrainSpec`; by default the batch size is 8 and the learning rate 0.05.

    Returns:
        The task, and a list. `task.report` appends the name of the stage and a copy of the model's state dict to it.
    """
    train = TrainSpec(**{"batch_size": 8, "lr": 0.05, **recipe})
    given = {"num_classes": CLASSES, "image_size": IMAGE_SIZE}
    reported: list[tuple[str, dict[str, Tensor]]] = []
    keep: Callable[[str, nn.Module], None] = lambda name, model: reported.append((name, copies(model)))  # noqa: E731
    grants = {
        "clean": coloured_split(24, 1) if clean is None else clean,
        "training-set": coloured_split(48, 2),
        "features": partial(features, precision="fp32"),
        "losses": partial(losses, precision="fp32"),
        "marked": coloured_split(24, 3),
        "tasks": [coloured_split(24, 4), coloured_split(24, 5)],
    }
    task = DefenseTask(
        model=model,
        num_classes=CLASSES,
        image_size=IMAGE_SIZE,
        train=train,
        device=CPU,
        precision="fp32",
        seed=seed,
        tune=Tuner(train, seed, CPU, "fp32", Observer(), "tuning"),
        logits=partial(logits, precision="fp32"),
        routing=partial(routings, precision="fp32"),
        fresh=partial(fresh_model, made_by, given, seed, CPU),
        report=keep,
        granted={need: grants[need] for need in needs},
    )
    return task, reported


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that differ between two state dicts."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def hooked(model: nn.Module) -> list[str]:
    """Return the names of the modules of a model that have a hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


def global_settings() -> tuple[object, ...]:
    """Return the settings of torch that a part must not change."""
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def ranked(routing: Routing, dim: int) -> bool:
    """Return whether, along `dim`, all selected gates are at least as large as all others."""
    taken = routing.gates.masked_fill(~routing.selected, 2).amin(dim)
    left = routing.gates.masked_fill(routing.selected, -1).amax(dim)
    return bool((taken >= left).all())
