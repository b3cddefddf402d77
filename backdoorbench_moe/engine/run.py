"""A run on disk: its record, model and trigger, and checks that they still match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from backdoorbench_moe import defenses
from backdoorbench_moe.attacks.base import Attack
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Material
from backdoorbench_moe.engine.build import (
    Stamper,
    build_attack,
    build_gate,
    build_splitter,
    build_stamper,
    describe,
    load_model,
)
from backdoorbench_moe.engine.device import RECORDED_PACKAGES
from backdoorbench_moe.engine.files import locate_files
from backdoorbench_moe.engine.names import plugin_packages, plugin_sources
from backdoorbench_moe.engine.poisoning.learned import restore_trigger
from backdoorbench_moe.engine.progress.notebook import run_html, run_line
from backdoorbench_moe.engine.torch_state import default_torch_state
from backdoorbench_moe.errors import RecordError, UnknownNameError
from backdoorbench_moe.records import MODEL, Record, RunFolder


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder and the record that was read from it."""

    folder: RunFolder
    record: Record

    def __repr__(self) -> str:
        return run_line(self.folder.path.name, self.record)

    def _repr_html_(self) -> str:
        return run_html(self.folder.path.name, self.record)

    @property
    def spec(self) -> RunSpec:
        """The spec of the run."""
        return self.record.run_spec

    def value(self, metric: str) -> float:
        """Return a metric in percent, such as "ba", "asr" or "cad". Raises UnknownNameError if it was not measured."""
        if metric not in self.record.metrics:
            raise UnknownNameError(f"run {self.folder.path}: metric", metric, self.record.metrics)
        return self.record.metrics[metric]["value"]

    @default_torch_state()
    def model(self) -> nn.Module:
        """Load the trained model on the CPU, in evaluation mode.

        Raises:
            RecordError: The model file does not match the spec or was replaced, or the run's plug-ins or their code
                have changed.
        """
        check_plugins(self.folder, self.record)
        tensors, _ = self.folder.load_tensors()
        model = load_model(self.spec, self.record.data, tensors, str(self.folder.path / MODEL))
        check_model(self)
        return model

    def located_spec(self) -> RunSpec:
        """Return the spec with the current paths of its files: the copies in the run folder, or the original paths.

        Raises:
            RecordError: A file is missing or its content has changed, or the run's plug-ins or their code have changed.
        """
        check_plugins(self.folder, self.record)
        return locate_files(self.spec, self.record.files, self.folder)

    def attack(self) -> Attack:
        """Build the attack of the run. Raises ConfigError for a clean run or an imported model."""
        return build_attack(self.located_spec())

    @default_torch_state()
    def stamper(self) -> Stamper:
        """Build the trigger and the applicator as this run used them, including the state of a learned trigger.

        Raises:
            ConfigError: The run has no trigger.
            RecordError: The trigger was learned, and its file is missing or was replaced.
        """
        stamper = self.blank_stamper()
        restore_trigger(stamper, self.folder, self.record)
        return stamper

    @default_torch_state()
    def blank_stamper(self) -> Stamper:
        """Build the trigger and the applicator as before the run: a learned trigger has no state yet."""
        return build_stamper(
            self.located_spec(),
            patch_size=self.record.parts.get("model", {}).get("patch_size"),
            image_size=self.record.data["image_size"],
        )


def check_model(run: Run) -> None:
    """Raise RecordError if the model file was replaced after the run finished."""
    known = run.record.model_sha256
    if known is not None and run.folder.model_sha256 not in (None, known):
        raise RecordError(f"model file {run.folder.path / MODEL}: was replaced after the run was finished")


def load_run(path: Path | str) -> Run:
    """Open a run folder. Raises RecordError if it is not a run folder or its record is damaged."""
    folder = RunFolder(path)
    return Run(folder, folder.read())


def check_finished(run: Run) -> None:
    """Raise RecordError unless a run is finished."""
    if run.record.status != "finished":
        raise RecordError(
            f"run folder {run.folder.path}: expected a finished run, its status is {run.record.status!r}"
        )


def check_data(folder: RunFolder, record: Record, data: Material) -> None:
    """Raise RecordError if the run in a folder was not made from these data."""
    if record.data.get("digest") != data.digest:
        raise RecordError(f"run folder {folder.path}: was made from other data; use another --output")


def check_plugins(folder: RunFolder, record: Record) -> None:
    """Raise RecordError if the packages that provide the parts of a run, their versions or their code have changed.

    Old records that do not contain the packages or hashes of their code are accepted.
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
            f"run folder {folder.path}: was made with {made}, but {there} is installed; "
            "delete it or use another --output"
        )
    coded, code = record.environment.get("sources", {}), plugin_sources(record.run_spec)
    if changed := sorted(
        package for package in coded.keys() & code.keys() if coded[package] != code[package]
    ):
        raise RecordError(
            f"run folder {folder.path}: the code of {', '.join(changed)} has changed since it was made; "
            "delete it or use another --output"
        )


def check_options(run: Run) -> None:
    """Check that the options of a run's parts would have the same values now.

    A spec contains only the options that were set. The others have their defaults, which a later version may change.
    Options that a later version added, options whose value depends on the images, and files, whose paths may differ,
    are not compared.

    Raises:
        RecordError: An option would have another value, or a file that a part reads is missing.
        ConfigError: A part no longer accepts an option.
    """
    then, files = run.record.parts, {file["key"] for file in run.record.files}
    changed = [
        f"{kind}.{name} was {then[kind][name]}, and is now {value}"
        for kind, values in _values_now(run).items()
        for name, value in values.items()
        if name in then[kind]
        and value is not None
        and then[kind][name] != value
        and f"{kind}.{name}" not in files
    ]
    if changed:
        raise RecordError(
            f"run folder {run.folder.path}: was made with other defaults: {'; '.join(changed)}; "
            "delete it or use another --output"
        )


def _values_now(run: Run) -> dict[str, dict[str, Any]]:
    """The values that the options of the recorded parts would have now."""
    spec, known = run.spec, run.record.parts.keys()
    parts: dict[str, object] = {}
    if "attack" in known:
        parts["attack"] = run.attack()
    if "splitter" in known:
        parts["splitter"] = build_splitter(spec)
    if "gate" in known:
        parts["gate"] = build_gate(spec)
    if known >= {"trigger", "applicator"}:
        stamper = run.blank_stamper()
        parts |= {"trigger": stamper.trigger, "applicator": stamper.applicator}
    if "defense" in known and spec.defenses:
        last = spec.defenses[-1]
        parts["defense"] = defenses.registry.create(last.name, last.options)
    return {kind: describe(part) for kind, part in parts.items()}
