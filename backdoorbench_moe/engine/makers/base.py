"""What all makers have in common: the record from start to end, whatever happens in between."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from backdoorbench_moe.collapse import collapsed
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.device import environment
from backdoorbench_moe.engine.evaluate import Metrics, measure
from backdoorbench_moe.engine.files import keep_files
from backdoorbench_moe.engine.graph import is_attacked
from backdoorbench_moe.engine.names import plugin_packages, plugin_sources
from backdoorbench_moe.engine.observer import StopRun
from backdoorbench_moe.engine.run import Run, check_data, check_plugins
from backdoorbench_moe.engine.setup import Setup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning
from backdoorbench_moe.ops.metrics import chance_rate
from backdoorbench_moe.ops.seeding import derive_seed, seeded
from backdoorbench_moe.records import Input, Record, RunFolder

Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]
SEED_PURPOSES = ("init", "poison", "trigger")


class Maker(ABC):
    """Makes one run.

    Everything is built and checked when the maker is made; nothing is on disk before `make`.

    Args:
        spec: The run's spec.
        workplace: Where it is made.
    """

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        self.spec, self.workplace = spec, workplace
        self.setup = Setup(spec, workplace.images)

    @abstractmethod
    def prepare(self, inputs: Mapping[str, Run]) -> None:
        """Take what the run is made from; may be called more than once.

        Args:
            inputs: Finished runs by their role, see `graph.needs`.

        Raises:
            BbmoeError: An input is missing or does not fit.
        """

    @final
    def make(self, folder: RunFolder, inputs: Mapping[str, Run]) -> Run:
        """Make the run in its folder, whose lock is held; an interrupted one is continued."""
        checkpoint = folder.load_checkpoint()
        if not checkpoint:
            self.prepare(inputs)
        record = self.new_record(inputs)
        if checkpoint:
            self._check_continued(folder, record)
        known = [file for run in inputs.values() for file in run.record.files]
        record.files = keep_files(self.spec, folder, known)
        folder.write(record)
        try:
            self.complete(folder, record, checkpoint)
        except (KeyboardInterrupt, StopRun):
            record.status = "interrupted"
            folder.write(record)
            raise
        except Exception as error:
            # Any exception, a plug-in's own included: the record must not say "running" for ever.
            record.status, record.error = "failed", str(error) or type(error).__name__
            folder.write(record)
            raise
        assert self.required_metrics() <= record.metrics.keys(), "the maker left out a metric"
        record.status, record.near_chance = "finished", collapsed(record)
        record.model_sha256 = folder.model_sha256
        folder.write(record)
        folder.drop_checkpoint()
        return Run(folder, record)

    @abstractmethod
    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train or change the model, measure it, fill in the record and save the model."""

    def required_metrics(self) -> set[str]:
        """The metrics that a finished run of this kind has."""
        return {"ba", "asr", "target_rate"} if self.spec.attacked else {"ba"}

    def new_record(self, inputs: Mapping[str, Run]) -> Record:
        """The record of the run at its start."""
        spec, images, workplace = self.spec, self.workplace.images, self.workplace
        record = Record.for_spec(spec)
        record.data = {
            "name": images.name,
            "classes": list(images.classes),
            "image_size": images.image_size,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "digest": images.digest,
            "fingerprint": workplace.fingerprint,
            "chance": 100 * chance_rate(images.test.labels.bincount().tolist()),
        }
        record.parts = self.setup.describe_parts()
        record.poison = self.setup.describe_poison()
        record.inputs = [
            Input(role=r, run=run.folder.path.name, digest=run.record.digest, sha256=run.folder.model_sha256)
            for r, run in inputs.items()
        ]
        record.seeds = {"run": spec.seed} | {p: derive_seed(spec.seed, p) for p in SEED_PURPOSES}
        record.environment = self.environment()
        return record

    def environment(self) -> dict[str, Any]:
        """What the run is made with, for the record."""
        device, precision = self.workplace.device, self.workplace.precision
        return environment(device, precision, plugin_packages(self.spec), plugin_sources(self.spec))

    def model_header(self) -> dict[str, str]:
        """Metadata of the model file, above all whether the model is backdoored."""
        return {
            "made_by": "backdoorbench_moe",
            "backdoored": "true" if is_attacked(self.spec) else "false",
            "purpose": "research on backdoors; not for deployment",
            "model": self.spec.model.name,
            "digest": self.spec.digest,
        }

    def measure(self, models: Sequence[nn.Module], *, recovery: bool = False) -> list[Metrics]:
        """Measure models; the triggered images are made once for all of them. See `evaluate.measure`."""
        triggered, test = self.setup.triggered_test(), self.workplace.images.test
        found, precision = [], self.workplace.precision
        for model in models:
            # A model that draws random numbers in evaluation mode draws the same ones every time.
            with seeded(self.spec.seed, "measure"):
                found.append(measure(model, test, triggered, precision=precision, recovery=recovery))
        return found

    def _check_continued(self, folder: RunFolder, record: Record) -> None:
        """Check that data and plug-ins are those of the interrupted run, and keep what was recorded at its start."""
        before = folder.read()
        record.parts["model"] = {**before.parts.get("model", {}), **record.parts["model"]}
        check_data(folder, before, self.workplace.images)
        check_plugins(folder, before)
        _warn_of_changes(folder, before.environment, record.environment)


def _warn_of_changes(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a continued run may get other numbers than one that was never interrupted."""
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
