"""Defend any module with clean images from the caller, without writing to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from backdoorbench_moe import defenses
from backdoorbench_moe.config import PartSpec, TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import Defense, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.inference import features, logits, losses, predict, routings
from backdoorbench_moe.engine.makers.defend import BEFORE, Stages
from backdoorbench_moe.engine.measuring.evaluate import Metrics, share
from backdoorbench_moe.engine.opening.opened_model import OpenedModel
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed, seeded


@dataclass(frozen=True)
class ModuleStage:
    """The model after a stage of a defense.

    Attributes:
        name: Name of the stage; the first is "before".
        model: A copy of the model.
        metrics: "ba" on the caller's labelled images, as in a run's record.
        seconds: Duration of the stage.
    """

    name: str
    model: nn.Module
    metrics: Metrics
    seconds: float


@dataclass(frozen=True)
class DefendedModule:
    """The result of a defense of a module.

    Attributes:
        defense: Name of the defense.
        stages: The model before the defense and after each stage, with its accuracy.
        judgements: The judgements of the defense. One about inputs is a filter, whose `judge` takes images.
    """

    defense: str
    stages: tuple[ModuleStage, ...]
    judgements: tuple[Judgement, ...]

    @property
    def model(self) -> nn.Module:
        """The defended model, on the device, in evaluation mode."""
        return self.stages[-1].model

    def value(self, metric: str) -> float:
        """A metric of the last stage, in percent, such as "ba"."""
        return self.stages[-1].metrics[metric]["value"]


def defend_module(
    opened: OpenedModel,
    defense: PartSpec,
    train: TrainSpec,
    *,
    seed: int = 0,
    observer: Observer | None = None,
) -> DefendedModule:
    """Apply a defense to an opened module. The module is not changed.

    The defender has all labelled images, whatever the defense's option `clean_fraction` is. They also serve as the
    training set for defenses that judge it or train on it.

    Args:
        opened: The model, with labelled images.
        defense: The defense.
        train: The training settings of the defense.
        seed: Seed of the random numbers of the defense.
        observer: Receives progress.

    Raises:
        ConfigError: There are no labelled images, or the defense is incompatible with the model.
    """
    held = opened.split
    if held is None:
        raise ConfigError("labels: expected the classes of the images, which a defense needs")
    built = defenses.registry.create(defense.name, defense.options)
    for need in ("marked", "tasks"):
        if need in built.needs:
            raise ConfigError(f"{defense.name}: needs {need} images, which only a run has; a module has none")
    built.check_model(opened.model)
    built.check_images(opened.model, opened.image_size)
    _check_count(built, held)
    own, stages = derive_seed(seed, "defense", 0), Stages()
    watcher = observer or Observer()
    task = _task(opened, held, train, own, watcher, defense.name, stages, sorted(built.needs))
    with reproducible(opened.device), seeded(own, "noise"):
        result = built(task)
    stages.add(result.stage, result.model.eval())
    measured = tuple(
        ModuleStage(name, model, {"ba": _accuracy(model, held, opened.precision)}, seconds)
        for name, model, seconds in ((BEFORE, opened.model, 0.0), *stages.kept)
    )
    return DefendedModule(defense.name, measured, result.judgements)


def _check_count(defense: Defense, held: Split) -> None:
    """Raise ConfigError if the defense needs more images or classes than the caller gave."""
    count, classes = len(held), len(held.labels.unique())
    if count < 2:  # Batch statistics need at least two images.
        raise ConfigError.expected("images", "at least 2 labelled images", count)
    defense.clean_fraction = 1.0  # The defender has all given images.
    try:
        defense.count(count, classes)
    except ConfigError as error:
        given = f"images: {count} of {classes} classes"
        raise ConfigError(
            str(error).replace(f"clean_fraction: 1.0 of {count} images is {count}", given)
        ) from None


def _task(
    opened: OpenedModel,
    held: Split,
    train: TrainSpec,
    seed: int,
    observer: Observer,
    name: str,
    stages: Stages,
    needs: list[str],
) -> DefenseTask:
    grants: dict[str, Callable[[], Any]] = {
        "clean": held.copy,
        "training-set": held.copy,
        "features": lambda: partial(features, precision=opened.precision),
        "losses": lambda: partial(losses, precision=opened.precision),
    }
    model = copy.deepcopy(opened.model)
    return DefenseTask(
        model=model,
        num_classes=opened.num_classes,
        image_size=opened.image_size,
        train=train,
        device=opened.device,
        precision=opened.precision,
        seed=seed,
        tune=Tuner(train, seed, opened.device, opened.precision, observer, name),
        logits=partial(logits, precision=opened.precision),
        routing=partial(routings, precision=opened.precision),
        fresh=partial(_draw_again, opened.model, seed),
        report=stages.add,
        progress=partial(observer.on_progress, name),
        granted={need: grants[need]() for need in needs},
    )


def _draw_again(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model with randomly initialised weights.

    Raises:
        ConfigError: A submodule has weights but no `reset_parameters`, so that they cannot be initialised.
    """
    fresh = copy.deepcopy(model)
    with seeded(seed, "fresh"):
        for name, module in fresh.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if not callable(reset):
                raise ConfigError(
                    f"model: {name or type(module).__name__} has no reset_parameters, which a defense needs to "
                    "initialise weights; import the model instead (import_weights)"
                )
            reset()
    return fresh.eval()


def _accuracy(model: nn.Module, split: Split, precision: str) -> dict[str, float]:
    return share(predict(model, split.images, precision=precision) == split.labels)
