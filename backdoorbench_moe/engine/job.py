"""Making one run: the model trained, measured and recorded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine import parts
from backdoorbench_moe.engine.device import RECORDED_PACKAGES, environment
from backdoorbench_moe.engine.evaluate import Metrics, measure
from backdoorbench_moe.engine.names import plugin_packages
from backdoorbench_moe.engine.notebook import run_html, run_line
from backdoorbench_moe.engine.observer import StopRun
from backdoorbench_moe.engine.poison import (
    check_classes,
    counted_for_asr,
    plan_poison,
    poisoned,
    triggered_test,
)
from backdoorbench_moe.engine.probe import Probe, check_probe
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.engine.train import Trainer
from backdoorbench_moe.errors import BbmoeWarning, RecordError, UnknownNameError
from backdoorbench_moe.models.base import StartsFromFile
from backdoorbench_moe.ops.seeding import derive_seed
from backdoorbench_moe.records import MODEL, Record, RunFolder

if TYPE_CHECKING:
    from backdoorbench_moe.engine.runner import Session

Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]
SEED_PURPOSES = ("init", "poison", "trigger")


@dataclass(frozen=True, repr=False)
class Run:
    """A run on disk and what was read from its record."""

    folder: RunFolder
    record: Record

    def __repr__(self) -> str:
        return run_line(self.folder.path.name, self.record)

    def _repr_html_(self) -> str:
        return run_html(self.folder.path.name, self.record)

    @property
    def spec(self) -> RunSpec:
        """What the run was made from."""
        return self.record.run_spec

    def value(self, metric: str) -> float:
        """A metric in percent: "ba", "asr" or "cad". Raises UnknownNameError for one that was not measured."""
        if metric not in self.record.metrics:
            raise UnknownNameError(f"run {self.folder.path}: metric", metric, self.record.metrics)
        return self.record.metrics[metric]["value"]

    @default_torch_state()
    def model(self) -> nn.Module:
        """The trained model, on the CPU, in evaluation mode. Raises RecordError if its file does not fit."""
        tensors, _ = self.folder.load_tensors()
        return parts.load_model(self.spec, self.record.data, tensors, str(self.folder.path / MODEL))

    @default_torch_state()
    def stamper(self) -> parts.Stamper:
        """The trigger and applicator as this run used them. Raises ConfigError for a clean run."""
        return parts.build_stamper(
            self.spec,
            patch_size=self.record.parts.get("model", {}).get("patch_size"),
            image_size=self.record.data["image_size"],
        )


def check_data(folder: RunFolder, record: Record, images: ImageSet) -> None:
    """Raise RecordError if the run in a folder was made from other images than these."""
    if record.data.get("digest") != images.digest:
        raise RecordError(f"run folder {folder.path}: was made from other data; use another --output")


def check_plugins(folder: RunFolder, record: Record) -> None:
    """Raise RecordError if a run's parts came from other packages, or other versions of them, than they do now.

    Records of before packages were recorded are taken as they are.
    """
    packages = record.environment.get("packages", {})
    then = {name: packages[name] for name in sorted(packages.keys() - set(RECORDED_PACKAGES))}
    now = plugin_packages(record.run_spec)
    if then and then != now:
        made, there = (
            ", ".join(f"{name} {version}" for name, version in each.items()) or "no plug-in"
            for each in (then, now)
        )
        raise RecordError(
            f"run folder {folder.path}: was made with {made}, and installed is {there}; "
            "delete it or use another --output"
        )


def _warn_of_changes(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a run goes on where its numbers need not be those of an uninterrupted one."""
    changed = [key for key in ("device", "precision", "threads") if before.get(key) != now[key]]
    if before.get("packages", {}).get("torch") != now["packages"]["torch"]:
        changed.append("torch")
    if changed:
        warnings.warn(
            f"run folder {folder.path} goes on under other conditions ({', '.join(changed)}): "
            "its numbers may differ from an uninterrupted run's",
            BbmoeWarning,
            stacklevel=2,
        )


class Job:
    """One run, built and checked when made; nothing is on disk before `run`."""

    def __init__(self, spec: RunSpec, session: Session) -> None:
        self.spec, self.session, self.images = spec, session, session.images
        images = self.images
        check_classes(spec.poison, images.num_classes)
        self.model = parts.build_model(spec, num_classes=images.num_classes, image_size=images.image_size)
        check_probe(spec, self.model, images)
        self.stamper, self.plan = None, None
        if not spec.is_clean:
            size = parts.model_patch_size(self.model)
            self.stamper = parts.build_stamper(spec, patch_size=size, image_size=images.image_size)
            self.plan = plan_poison(images.train.labels, spec.poison, images.num_classes, spec.seed)
            counted_for_asr(images.test.labels, spec.poison, images.num_classes)

    def start(self) -> None:
        """Give the model the weights from a file that its training begins with, if it names one.

        Raises ConfigError if the file is not there or does not fit.
        """
        if isinstance(self.model, StartsFromFile):
            self.model.load_start()

    def run(self, folder: RunFolder) -> Run:
        """Train, measure and record, holding the folder's lock."""
        checkpoint = folder.load_checkpoint()
        if not checkpoint:
            self.start()
        record = self._record()
        if checkpoint:
            before = folder.read()
            # What only the start knew of the model.
            record.parts["model"] = {**before.parts.get("model", {}), **record.parts["model"]}
            check_data(folder, before, self.images)
            check_plugins(folder, before)
            _warn_of_changes(folder, before.environment, record.environment)
        folder.write(record)
        try:
            self._complete(folder, record, checkpoint)
        except (KeyboardInterrupt, StopRun):
            record.status = "interrupted"
            folder.write(record)
            raise
        except Exception as error:
            # Anything: a plug-in's own error too must not leave a record that says "running" for ever.
            record.status, record.error = "failed", str(error) or type(error).__name__
            folder.write(record)
            raise
        record.status = "finished"
        folder.write(record)
        folder.drop_checkpoint()
        return Run(folder, record)

    def _complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        started = time.perf_counter()
        with self._training_split(folder, record) as split:
            probe = self._probe(folder)
            trainer = self._trainer(folder, split, probe)
            if checkpoint:
                trainer.restore(*checkpoint)
            if probe is not None:
                probe.begin(trainer.model, trainer.progress.epoch)
            # The same list, which grows with every epoch: an interrupted run's record has it, too.
            record.history = trainer.progress.history
            progress = trainer.fit(folder.path.name)
        record.timing["train_seconds"] = progress.seconds
        record.timing["images_per_second"] = len(self.images.train) * progress.epoch / progress.seconds
        evaluated = time.perf_counter()
        [record.metrics] = self._measure([trainer.model])
        record.timing["evaluate_seconds"] = time.perf_counter() - evaluated
        record.timing["total_seconds"] = time.perf_counter() - started
        folder.save_model(trainer.model.state_dict(), self._model_header())

    @contextmanager
    def _training_split(self, folder: RunFolder, record: Record) -> Iterator[Split]:
        """The training images as the victim sees them, poisoned for as long as the block lasts."""
        if self.stamper is None or self.plan is None:
            yield self.images.train
            return
        folder.save_poison(self.plan.indices.numpy())
        started = time.perf_counter()
        with poisoned(self.images.train, self.plan, self.stamper) as split:
            record.timing["poison_seconds"] = time.perf_counter() - started
            yield split

    def _probe(self, folder: RunFolder) -> Probe | None:
        if not self.spec.probe:
            return None
        return Probe(self.spec, self.images, self.stamper, self.session.precision, folder)

    def _trainer(self, folder: RunFolder, split: Split, probe: Probe | None) -> Trainer:
        def keep(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
            # The probe first: a checkpoint without its look could not be gone on from.
            if probe is not None:
                probe.look(self.model)
            folder.save_checkpoint(tensors, state)

        return Trainer(
            self.model,
            split,
            self.spec.train,
            seed=self.spec.seed,
            device=self.session.device,
            precision=self.session.precision,
            on_checkpoint=keep,
            observer=self.session.observer,
        )

    def _measure(self, models: Sequence[nn.Module], *, recovery: bool = False) -> list[Metrics]:
        """What `measure` finds for each model; the triggered images are made once for all of them."""
        triggered = None
        if self.stamper is not None:
            triggered = triggered_test(self.images, self.spec.poison, self.stamper)
        precision = self.session.precision
        return [
            measure(model, self.images.test, triggered, precision=precision, recovery=recovery)
            for model in models
        ]

    def _record(self) -> Record:
        spec, images = self.spec, self.images
        record = Record.for_spec(spec)
        record.data = {
            "name": images.name,
            "classes": list(images.classes),
            "image_size": images.image_size,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "digest": images.digest,
        }
        record.parts = {"model": parts.describe(self.model)}
        # Also where the model's class has it: `Run.stamper` builds the applicator anew from this.
        if (size := parts.model_patch_size(self.model)) is not None:
            record.parts["model"]["patch_size"] = size
        if self.stamper is not None and self.plan is not None:
            record.parts["trigger"] = parts.describe(self.stamper.trigger)
            record.parts["applicator"] = parts.describe(self.stamper.applicator)
            record.poison = {
                "rate": spec.poison.rate,
                "n": len(self.plan.indices),
                "target": spec.poison.target,
            }
        record.seeds = {"run": spec.seed} | {p: derive_seed(spec.seed, p) for p in SEED_PURPOSES}
        plugins = plugin_packages(spec)
        record.environment = environment(self.session.device, self.session.precision, plugins)
        return record

    def _model_header(self) -> dict[str, str]:
        """What the model file says of itself: above all, that it is backdoored."""
        return {
            "made_by": "backdoorbench_moe",
            "backdoored": "false" if self.spec.is_clean else "true",
            "purpose": "research on backdoors; not for deployment",
            "model": self.spec.model.name,
            "digest": self.spec.digest,
        }
