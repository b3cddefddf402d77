"""Making a defended run: a finished run's model, defended, measured after every stage and recorded."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from backdoorbench_moe import defenses, models
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.engine import parts
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.evaluate import Metrics, logits, routings
from backdoorbench_moe.engine.filtering import measure_filtered
from backdoorbench_moe.engine.job import Checkpoint, Job, Run, check_data
from backdoorbench_moe.engine.poison import stamp_images, triggered_test
from backdoorbench_moe.engine.tune import Tuner
from backdoorbench_moe.errors import ConfigError, PluginError, RecordError
from backdoorbench_moe.ops.seeding import derive_seed, generator, seeded
from backdoorbench_moe.records import Record, RunFolder

if TYPE_CHECKING:
    from backdoorbench_moe.engine.runner import Session


def build_defense(spec: RunSpec, place: int) -> Defense:
    """The defense at a place of the spec's list. Raises ConfigError naming `defenses[place].option`."""
    part = spec.defenses[place]
    with _named(place, part.name):
        return defenses.registry.create(part.name, part.options)


def check_defenses(spec: RunSpec, model: nn.Module, images: ImageSet) -> Defense | None:
    """Check all defenses of a spec against its model, trained or not, and the data; return the last one.

    Raises ConfigError naming the defense and its option.
    """
    defense = None
    for place, part in enumerate(spec.defenses):
        defense = build_defense(spec, place)
        with _named(place, part.name):
            defense.count(len(images.train), images.num_classes)
            defense.check(model)
    return defense


@contextmanager
def _named(place: int, name: str) -> Iterator[None]:
    """Let an error about an option say which defense of the spec it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"defenses[{place}].{str(error).removeprefix(f'defense {name!r}: ')}") from error


def fresh_model(part: PartSpec, given: Mapping[str, int], seed: int, device: torch.device) -> nn.Module:
    """A newly drawn model of the same make as a run's, from a defense's seed, in evaluation mode."""
    with seeded(seed, "fresh"):
        model = models.registry.create(part.name, part.options, given)
    return model.to(device).to(memory_format=torch.channels_last).eval()


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


class Stages:
    """Copies of a model at the end of each stage, with the seconds it took; they are measured afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [("before", copy.deepcopy(model), 0.0)]
        self._since = time.perf_counter()

    def add(self, name: str, model: nn.Module) -> None:
        """Keep the model as it is now. Raises PluginError for a name that is none or was there."""
        now = time.perf_counter()
        if not isinstance(name, str) or not name or name in [kept for kept, *_ in self.kept]:
            raise PluginError(f"defense: expected a new name for a stage, got {name!r}")
        self.kept.append((name, copy.deepcopy(model), now - self._since))
        self._since = time.perf_counter()


class DefenseJob(Job):
    """One defended run, built and checked when made; nothing is on disk before `run`.

    parent: the finished run whose model the last defense of the spec is applied to.
    """

    def __init__(self, spec: RunSpec, session: Session, parent: Run) -> None:
        super().__init__(spec, session)
        self.parent = parent
        self._check_parent()
        defense = check_defenses(spec, self.model, self.images)
        assert defense is not None
        self.defense = defense
        self.seed = derive_seed(spec.seed, "defense", len(spec.defenses) - 1)
        self.model = parent.model().to(session.device).to(memory_format=torch.channels_last)

    def start(self) -> None:
        """Nothing: the parent's model is trained."""

    def _check_parent(self) -> None:
        """Raise RecordError if the parent is another spec's run, or was made from other data."""
        folder, record, there = self.parent.folder, self.parent.record, self.images.classes
        if record.digest != self.spec.parent().digest or record.status != "finished":
            raise RecordError(f"run folder {folder.path}: is not the finished run that is to be defended")
        if tuple(record.data["classes"]) != there:
            known = len(record.data["classes"])
            raise RecordError(
                f"run folder {folder.path}: its model tells {known} classes apart, which are not "
                f"the {len(there)} of the data"
            )
        check_data(folder, record, self.images)

    def _complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        started = time.perf_counter()
        if self.plan is not None:
            folder.save_poison(self.plan.indices.numpy())
        stages, tuner = Stages(self.model), self._tuner()
        record.history = tuner.history
        result = self._defend(stages, tuner)
        evaluated = time.perf_counter()
        names, kept, seconds = zip(*stages.kept, strict=True)
        metrics = self._measure_stages(kept, result)
        record.stages = [
            {"name": name, "metrics": found, "seconds": taken}
            for name, found, taken in zip(names, metrics, seconds, strict=True)
        ]
        record.metrics = dict(metrics[-1])
        record.scores, record.verdict = dict(result.scores), dict(result.verdict)
        record.timing["defense_seconds"] = sum(seconds)
        if record.history:
            spent = sum(row["seconds"] for row in record.history)
            tuned_on = record.data["clean_images"] * len(record.history)
            record.timing |= {"train_seconds": spent, "images_per_second": tuned_on / spent}
        record.timing["evaluate_seconds"] = time.perf_counter() - evaluated
        record.timing["total_seconds"] = time.perf_counter() - started
        folder.save_model(kept[-1].state_dict(), self._model_header())

    def _measure_stages(self, kept: Sequence[nn.Module], result: DefenseResult) -> list[Metrics]:
        """BA, ASR and RA of each stage's model; the last one behind its filter, where there is one."""
        if result.filter is None or result.threshold is None:
            return self._measure(kept, recovery=True)
        session, spec = self.session, self.spec
        metrics = self._measure(kept[:-1], recovery=True)
        session.observer.on_message(f"measuring the filter of {spec.defenses[-1].name}")
        triggered = None
        if self.stamper is not None:
            triggered = triggered_test(self.images, spec.poison, self.stamper)
        with reproducible(session.device), seeded(self.seed, "filter noise"):
            filtered = measure_filtered(
                kept[-1],
                self.images.test,
                triggered,
                result.filter,
                result.threshold,
                seed=spec.seed,
                precision=session.precision,
            )
        return [*metrics, filtered]

    def _defend(self, stages: Stages, tuner: Tuner) -> DefenseResult:
        """Hand the defense what it may know, and nothing that leads to the attacker."""
        given = {"num_classes": self.images.num_classes, "image_size": self.images.image_size}
        task = DefenseTask(
            model=self.model,
            clean=self._clean_images(),
            num_classes=self.images.num_classes,
            train=self.spec.train,
            device=self.session.device,
            precision=self.session.precision,
            seed=self.seed,
            tune=tuner,
            logits=partial(logits, precision=self.session.precision),
            routing=partial(routings, precision=self.session.precision),
            fresh=partial(fresh_model, self.spec.model, given, self.seed, self.session.device),
            report=stages.add,
        )
        before = _shapes(self.model)
        with reproducible(self.session.device), seeded(self.seed, "noise"):
            result = self.defense(task)
        if _shapes(result.model) != before:
            raise PluginError(
                f"defense {self.spec.defenses[-1].name!r}: expected a model of the same architecture"
            )
        stages.add(result.stage, result.model.eval())
        return result

    def _clean_images(self) -> Split:
        """A copy of the training images that the defender holds, truly labelled."""
        train = self.images.train
        count = self.defense.count(len(train), self.images.num_classes)
        keep = torch.randperm(len(train), generator=generator(self.seed, "clean"))[:count].sort().values
        place = keep.to(train.images.device)
        images = train.images[place]
        if self.defense.finetune_data == "notebook" and self.plan is not None and self.stamper is not None:
            stamped = torch.isin(keep, self.plan.indices).to(images.device)
            images[stamped] = stamp_images(images[stamped], self.stamper)
        return Split(images, train.labels[place])

    def _tuner(self) -> Tuner:
        session, name = self.session, self.spec.defenses[-1].name
        return Tuner(self.spec.train, self.seed, session.device, session.precision, session.observer, name)

    def _record(self) -> Record:
        record = super()._record()
        record.parent = self.parent.folder.path.name
        record.parts["defense"] = parts.describe(self.defense)
        record.data["clean_images"] = self.defense.count(len(self.images.train), self.images.num_classes)
        record.seeds["defense"] = self.seed
        return record

    def _model_header(self) -> dict[str, str]:
        names = ", ".join(part.name for part in self.spec.defenses)
        return {**super()._model_header(), "defended_by": names, "parent": self.parent.folder.path.name}
