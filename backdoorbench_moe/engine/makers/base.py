"""Base class of makers, which train or defend the model of a run and write its folder."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import nn

from backdoorbench_moe.collapse import collapsed
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.device import environment
from backdoorbench_moe.engine.files import keep_files
from backdoorbench_moe.engine.graph import PARENT, expert_role
from backdoorbench_moe.engine.makers.fitting import Checkpoint
from backdoorbench_moe.engine.measuring.evaluate import Metrics
from backdoorbench_moe.engine.names import check_part_options, plugin_packages, plugin_sources
from backdoorbench_moe.engine.progress.observer import Observer, StopRun
from backdoorbench_moe.engine.provenance import backdoored
from backdoorbench_moe.engine.run import Run, check_data, check_options, check_plugins
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.engine.setups.choice import make_setup
from backdoorbench_moe.engine.weights.start import Start, check_start, load_start
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning, PluginError, RecordError
from backdoorbench_moe.ops.seeding import derive_seed, seeded
from backdoorbench_moe.plugins import describe_error
from backdoorbench_moe.records import GateShares, Input, Record, RunFolder

# Purposes of the seeds that are derived from the run's seed and recorded.
SEED_PURPOSES = ("init", "poison", "trigger")


class Maker(ABC):
    """Creates one run: builds and measures a model, and writes the run folder.

    The constructor builds and checks all parts of the run. Nothing is written before `make` is called. Subclasses
    implement `load` and `complete`.

    Args:
        spec: The run's spec.
        workplace: The data, the device, the precision and the observer.

    Raises:
        BbmoeError: A part cannot be built, or is incompatible with the data or another part.
    """

    # Whether to copy large files that the trigger's options name into the run folder.
    keeps_trigger_files: ClassVar[bool] = False
    # Whether the run starts from the weights in the file that the model's option `weights` names.
    starts_from_file: ClassVar[bool] = False
    setup: Setup

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        self.spec, self.workplace = spec, workplace
        # Before the images are read, which may take long.
        check_part_options(spec)
        if self.starts_from_file:
            check_start(spec)
        self.setup = make_setup(spec, workplace.data)
        self.inputs: Mapping[str, Run] = {}
        self.start: Start | None = None
        self._is_prepared = False
        self._gate_shares: list[GateShares] = []

    @final
    def check_weights(self) -> None:
        """Check that the file of initial weights, if there is one, matches the model, by loading it.

        Raises:
            RecordError: The file cannot be read or does not match the model.
        """
        if self.starts_from_file:
            load_start(self.spec, self.setup.model, Observer())

    @final
    def prepare(self, inputs: Mapping[str, Run]) -> None:
        """Load what the run needs before it starts; see `load`.

        A second call does nothing. `make` does not call it for a run that continues from a checkpoint.
        """
        if not self._is_prepared:
            self.inputs = inputs
            self.load(inputs)
            self._is_prepared = True

    @abstractmethod
    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load what the run needs before it starts, such as the weights of another run.

        Args:
            inputs: The finished runs that this one is built from, by role; see `graph.needs`.

        Raises:
            BbmoeError: An input is missing or incompatible.
        """

    @final
    def make(self, folder: RunFolder, inputs: Mapping[str, Run]) -> Run:
        """Execute the run, or continue it from its last checkpoint.

        If it is interrupted or fails, the record is updated and the exception is raised again.

        Args:
            folder: The run folder. The caller must hold its lock.
            inputs: The finished runs that this one is built from, by role.

        Returns:
            The finished run.
        """
        self.inputs = inputs
        checkpoint = folder.load_checkpoint()
        if not checkpoint:
            self.prepare(inputs)
        record = self.new_record(inputs)
        if checkpoint:
            self._check_continued(folder, record)
        known = [file for run in inputs.values() for file in run.record.files]
        record.files = keep_files(self.spec, folder, known, all_of_trigger=self.keeps_trigger_files)
        try:
            folder.write(record)
            self.complete(folder, record, checkpoint)
        except (KeyboardInterrupt, StopRun):
            record.status = "interrupted"
            folder.write(record)
            raise
        except (Exception, SystemExit) as error:
            # Any exception, including those of plug-ins, since the record must not keep the status "running".
            record.status, record.error = "failed", describe_error(error) or type(error).__name__
            folder.write(record)
            if isinstance(error, SystemExit):
                # The part of a plug-in must not end the command, or the other runs of a suite.
                raise PluginError(record.error) from error
            raise
        assert self.required_metrics() <= record.metrics.keys(), "the maker left out a metric"
        record.gate_shares = self._gate_shares
        record.status, record.near_chance = "finished", collapsed(record)
        record.model_sha256 = folder.model_sha256
        folder.write(record)
        folder.drop_checkpoint()
        return Run(folder, record)

    @abstractmethod
    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train or defend the model, measure it, fill in the record and save the model.

        Args:
            folder: The run folder.
            record: The record of the run, which is changed in place and written by `make`.
            checkpoint: The last checkpoint of an interrupted run; None for a new run.
        """

    def required_metrics(self) -> set[str]:
        """Return the metrics that the record of every finished run must have."""
        needed = {"ba", *(self.setup.attack_metrics if self.spec.attacked else ())}
        return needed | ({"unsafe"} if self.spec.policy else set())

    def new_record(self, inputs: Mapping[str, Run]) -> Record:
        """Return the record of the run at its start."""
        spec = self.spec
        record = Record.for_spec(spec)
        record.data = {**self.setup.describe_data(), "fingerprint": self.workplace.fingerprint}
        record.parts = self.setup.describe_parts()
        if self.start is not None:
            record.parts["model"]["start"] = self.start.to_dict()
        record.poison = self.setup.describe_poison()
        record.tasks = self.setup.describe_tasks()
        record.inputs = [
            Input(role=r, run=run.folder.path.name, digest=run.record.digest, sha256=run.folder.model_sha256)
            for r, run in inputs.items()
        ]
        record.seeds = {"run": spec.seed} | {p: derive_seed(spec.seed, p) for p in SEED_PURPOSES}
        record.environment = self.environment()
        return record

    def environment(self) -> dict[str, Any]:
        """Return the software and hardware of the run, for the record."""
        device, precision = self.workplace.device, self.workplace.precision
        return environment(device, precision, plugin_packages(self.spec), plugin_sources(self.spec))

    def model_header(self, record: Record) -> dict[str, str]:
        """Return the metadata of the model file, including whether the model is backdoored.

        Args:
            record: The record of the run, which describes the weights that training started from.
        """
        return {
            "made_by": "backdoorbench_moe",
            "backdoored": backdoored(self.spec, record, self.inputs.values()),
            "purpose": "research on backdoors; not for deployment",
            "model": self.spec.model.name,
            "digest": self.spec.digest,
        }

    def measure(self, models: Sequence[nn.Module], *, recovery: bool = False) -> list[Metrics]:
        """Measure models on clean and triggered test images; see `evaluate.measure`.

        Args:
            models: The models, on the workplace's device.
            recovery: Whether to measure the accuracy on triggered images (RA), too.

        Returns:
            The metrics of each model.
        """
        found = []
        for model in models:
            # A model that draws random numbers in evaluation mode must draw the same ones every time.
            with seeded(self.spec.seed, "measure"):
                found.append(self.measure_one(model, recovery=recovery))
        return found

    def measure_one(self, model: nn.Module, *, recovery: bool) -> Metrics:
        """Measure one model; see `measure`."""
        expert_ba = None
        if self.setup.is_mixture:
            assert self.spec.mixture is not None
            expert_ba = expert_accuracy(self.inputs, self.spec.mixture.experts)
        metrics, self._gate_shares = self.setup.measure(
            model, precision=self.workplace.precision, expert_ba=expert_ba, recovery=recovery
        )
        return metrics

    def _check_continued(self, folder: RunFolder, record: Record) -> None:
        """Check that data, plug-ins and inputs are those of the interrupted run; warn if the environment has changed.

        Values of the model and the trigger that were only known at the start of the run, such as the hash of the
        initial weights, are copied to the new record.
        """
        before = folder.read()
        for kind in ("model", "trigger"):
            if kind in record.parts:
                record.parts[kind] = {**before.parts.get(kind, {}), **record.parts[kind]}
        check_data(folder, before, self.workplace.data)
        check_plugins(folder, before)
        check_options(Run(folder, before))
        hashes = {each["role"]: each["sha256"] for each in before.inputs}
        for each in record.inputs:
            if None not in (known := hashes.get(each["role"]), each["sha256"]) and known != each["sha256"]:
                raise RecordError(
                    f"run folder {folder.path}: the model of {each['run']} has changed since the run was started; "
                    "delete the folder to run it again"
                )
        _warn_of_changes(folder, before.environment, record.environment)


def expert_accuracy(inputs: Mapping[str, Run], experts: int) -> list[float]:
    """Accuracy of each task's benign expert on its task, in percent, from the runs that a mixture is built from."""
    if (parent := inputs.get(PARENT)) is not None:
        known = parent.record.metrics
        return [known[f"task/{e}.expert_ba"]["value"] for e in range(experts)]
    found = [inputs[expert_role(e)].record.metrics for e in range(experts)]
    # The record of a poisoned expert contains the accuracy of the benign expert that the attacker started from.
    return [metrics.get("benign_ba", metrics["ba"])["value"] for metrics in found]


def _warn_of_changes(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if the environment has changed, so that a continued run may have other metrics than an uninterrupted one."""
    changed = [key for key in ("device", "precision", "threads") if before.get(key) != now[key]]
    if before.get("packages", {}).get("torch") != now["packages"]["torch"]:
        changed.append("torch")
    if changed:
        warnings.warn(
            f"run folder {folder.path}: the run continues in another environment ({', '.join(changed)}); "
            "its metrics may differ from those of an uninterrupted run",
            BbmoeWarning,
            stacklevel=2,
        )
