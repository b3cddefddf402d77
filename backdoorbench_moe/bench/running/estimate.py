"""Time estimates of missing runs, from a short measurement on this machine."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from backdoorbench_moe import defenses, triggers
from backdoorbench_moe.bench.running.plan import Planned
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Material
from backdoorbench_moe.data.text import TextSet
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.engine.build import build_model
from backdoorbench_moe.engine.device import reproducible, resolve_device, resolve_precision
from backdoorbench_moe.engine.graph import NodeKind, kind_of
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring.filtering import IMAGES
from backdoorbench_moe.engine.measuring.generation import answer
from backdoorbench_moe.engine.training.step import WARMUP_STEPS
from backdoorbench_moe.engine.training.train import Trainer
from backdoorbench_moe.engine.training.tune import training_only
from backdoorbench_moe.moe.merging import check_mergeable
from backdoorbench_moe.moe.structure import Merged
from backdoorbench_moe.ops.images import Split, batch_size_for
from backdoorbench_moe.triggers.learned import LearnedTrigger
from backdoorbench_moe.triggers.optimised import OptimisedTrigger
from backdoorbench_moe.triggers.trainable import TrainableTrigger

# Long enough to average over the slow first steps, short enough for a suite with four models.
SECONDS = 2.0
# Queries that a language model answers to measure its speed.
QUERIES = 32


@dataclass(frozen=True)
class Speed:
    """Speed of a kind of run on this machine.

    Attributes:
        train: Images per second in training.
        predict: Images per second in evaluation.
        peak_bytes: Peak device memory in bytes; 0 on a CPU.
    """

    train: float
    predict: float
    peak_bytes: int = 0


def measure_speed(spec: RunSpec, images: Material) -> Speed:
    """Train and predict (or answer queries) for a few seconds, as the run would, and discard the result."""
    device = resolve_device(spec.device)
    precision = resolve_precision(spec.precision, device)
    model = build_model(spec, images.model_options)
    split, batch = images.train.to(device), min(spec.train.batch_size, len(images.train))
    modules = trained_modules(spec, model)
    # The optimizer is created with the parameters that are trainable at that time.
    with training_only(model, modules):
        trainer = Trainer(
            model,
            split,
            spec.train,
            seed=0,
            device=device,
            precision=precision,
            on_checkpoint=lambda *_: None,
        )
        return _measure(trainer, images, batch)


def _measure(trainer: Trainer, images: Material, batch: int) -> Speed:
    device = trainer.device
    trainer.model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    indices = torch.arange(batch, device=device)
    with reproducible(device):
        train = batch * _rate(lambda: trainer.step(indices), WARMUP_STEPS + 1, device)
    predicted = _predicting(trainer, images)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Speed(train, predicted, peak)


def _predicting(trainer: Trainer, data: Material) -> float:
    """Return the number of images predicted, or of queries answered, per second."""
    device, precision = trainer.device, trainer.step.precision
    if isinstance(data, TextSet):
        ask = partial(
            answer, new_tokens=data.answer_tokens, end=data.end, padding=data.padding, precision=precision
        )
        queries = Split(data.test.images[:QUERIES], data.test.labels[:QUERIES]).to(device)
        return len(queries) * _rate(lambda: ask(trainer.model, queries), 0, device)
    some = data.test.images[: batch_size_for(data.test.images)].to(device)
    return len(some) * _rate(lambda: predict(trainer.model, some, precision=precision), 1, device)


def trained_modules(spec: RunSpec, model: nn.Module) -> list[nn.Module] | None:
    """Return the modules that a run trains: the MLPs of an expert, the routers of a mixture; None for all."""
    if isinstance(model, Merged):
        return model.routers()
    return None if spec.mixture is None else list(check_mergeable(model).mlps().values())


def _rate(step: Callable[[], object], warmup: int, device: torch.device) -> float:
    """Return the number of calls per second, after `warmup` calls."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        step()
    wait()
    started = time.perf_counter()
    for done in itertools.count(1):
        step()
        wait()
        if (passed := time.perf_counter() - started) > SECONDS:
            return done / passed
    raise AssertionError


def seconds_left(run: Planned, speed: Speed, images: Material, model: nn.Module) -> float | None:
    """Estimate the remaining seconds of a run: its epochs and the evaluation on clean and on marked images.

    Before the first epoch, the optimisation of the trigger is included, if any; a surrogate of another architecture is
    assumed to be as fast as the run's own model. A defended run is evaluated before the defense and at its end;
    intermediate stages are not counted. It starts over after an interruption.

    Args:
        run: The run.
        speed: The speed of its model.
        images: Its data.
        model: Its model, trained or not.

    Returns:
        The seconds; None if unknown: for a defense that does not state its cost (see `Defense.cost`), and for a trigger
        whose networks are trained with the model, since only the speed of the model is measured.
    """
    if run.status == "finished":
        return 0.0
    evaluation = _tested(run.spec, images) / speed.predict
    if run.spec.defenses:
        cost = defense_cost(run.spec, images, model)
        return None if cost is None else _defense_seconds(cost, run.spec, speed, images) + evaluation
    trigger = _learned(run.spec)
    if isinstance(trigger, TrainableTrigger):
        return None
    left = run.passes * (1 - run.epochs / run.total_epochs) if run.total_epochs else 0.0
    optimised = 0
    if isinstance(trigger, OptimisedTrigger) and not run.epochs:
        stamped = (run.spec.poison.count(len(images.train), group) for group in ("rate", "cover"))
        optimised = trigger.passes(sum(stamped))
    return (left * _train_images(run.spec, images) + optimised) / speed.train + evaluation


def defense_cost(spec: RunSpec, images: Material, model: nn.Module) -> Cost | None:
    """Return the cost of the last defense of a spec.

    Args:
        spec: The spec.
        images: The data.
        model: The model, trained or not.

    Returns:
        The cost that the defense states, or else the epochs in its options; None if neither is known.

    Raises:
        BbmoeError: The defense cannot be built, or does not fit the data.
    """
    part, train = spec.defenses[-1], len(images.train)
    classes = images.model_options.get("num_classes", 0)
    defense = defenses.registry.create(part.name, part.options)
    recipe = spec.train if spec.mixture is None else spec.mixture.expert_train
    held = defense.count(train, classes)
    stated = defense.cost(model, held=held, train=train, classes=classes, recipe=recipe)
    passes = Planned(spec, "missing").passes
    return stated if stated is not None or not passes else Cost(trained=passes * train)


def judged_inputs(spec: RunSpec, images: Material) -> int:
    """Return the number of clean and triggered test images on which an input filter is evaluated."""
    return min(IMAGES, len(images.test)) * (2 if spec.attacked else 1)


def _defense_seconds(cost: Cost, spec: RunSpec, speed: Speed, images: Material) -> float:
    predicted = cost.predicted + judged_inputs(spec, images) * cost.judged
    return cost.trained / speed.train + predicted / speed.predict


def _train_images(spec: RunSpec, images: Material) -> int:
    """Return the number of images per epoch, ignoring the size of a task that is a group of classes."""
    count, mixture = len(images.train), spec.mixture
    if kind_of(spec) is NodeKind.MIXTURE and mixture is not None and mixture.gate_images is not None:
        return mixture.experts * mixture.gate_images
    return round(count * (1 + spec.policy)) if kind_of(spec) is not NodeKind.MIXTURE else count


def _learned(spec: RunSpec) -> LearnedTrigger | None:
    """Return the trigger of a run if it is learned from data."""
    if kind_of(spec) is not NodeKind.TRAINED or spec.trigger is None:
        return None
    trigger = triggers.registry.create(spec.trigger.name, spec.trigger.options)
    return trigger if isinstance(trigger, LearnedTrigger) else None


def _tested(spec: RunSpec, data: Material) -> int:
    """Return the number of test images that a model classifies, or of test queries that it answers.

    Images: clean ones of each task, marked ones and, after an attack, the same ones without the mark. Texts: those of
    all tasks (for an expert, of its own task), and the queries to refuse.
    """
    mixture, stages = spec.mixture, 2 if spec.defenses else 1
    if isinstance(data, TextSet):
        own = data.test if mixture is None or mixture.task is None else data.tasks[mixture.task].test
        return stages * (len(own) + (len(data.refused_test) if spec.policy else 0))
    clean = mixture.experts if mixture is not None and mixture.task is None else 1
    marked = int(spec.attacked) + (int(spec.policy > 0) if mixture is not None else 0)
    return stages * (clean + marked) * len(data.test)


def kinds(runs: Sequence[Planned]) -> Iterator[tuple[str, list[Planned]]]:
    """Group runs with the same time per epoch: those with the same data, model and batch size."""
    grouped: dict[str, list[Planned]] = {}
    for run in runs:
        spec = run.spec
        key = [
            spec.dataset.to_dict(),
            spec.model.to_dict(),
            spec.train.batch_size,
            kind_of(spec).name if spec.mixture is not None else "",
            None if spec.mixture is None else spec.mixture.experts,
            None if spec.gate is None else spec.gate.to_dict(),
            spec.precision,
            spec.device,
        ]
        grouped.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    yield from grouped.items()
