"""Progress of the runs of a suite."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe import attacks, defenses
from backdoorbench_moe.bench.running.life_sign import is_fresh, read_life_sign
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.engine.graph import NodeKind, kind_of
from backdoorbench_moe.records import RunFolder
from backdoorbench_moe.records.status import status_of
from backdoorbench_moe.registry import Registry

# Options of attacks on experts that set the length of their steps.
ATTACK_EPOCHS = ("preference_epochs", "epochs")
# Options of defenses, with the share of the recipe's epochs that None stands for: a tenth, or all. Epochs of
# `unlearning_epochs` have few images.
DEFENSE_EPOCHS = {"isolation_epochs": 10, "epochs": 1}


@dataclass(frozen=True)
class Planned:
    """A run and its progress.

    Attributes:
        spec: The run's spec.
        status: Status of its record (see `records.status`), or "missing".
        epochs: Number of finished epochs; with a fraction if the run is being executed now.
        images_per_second: Speed of a run that a suite is executing now; otherwise 0.
        images: Images per epoch of such a run; otherwise 0.
        error: Why the run failed; None if it did not fail.
    """

    spec: RunSpec
    status: str
    epochs: float = 0.0
    images_per_second: float = 0.0
    images: int = 0
    error: str | None = None

    @property
    def total_epochs(self) -> int:
        """Total number of epochs of the run.

        For a defense, the sum of its options `isolation_epochs` and `epochs`, or 0 if it has neither. They depend on
        the run's recipe if they are None, and are 0 if the option `retrain` is off. For an expert that is read from a
        folder, 0. For an attack on an expert, the sum of its options `preference_epochs` and `epochs`; if it has
        neither, the epochs of expert tuning.
        """
        kind, mixture = kind_of(self.spec), self.spec.mixture
        if kind is NodeKind.DEFENDED:
            return self._defense_epochs()
        if kind is NodeKind.TRAINED or mixture is None:
            return self.spec.train.epochs
        if kind is NodeKind.MIXTURE:
            return mixture.gate_train.epochs
        if kind is NodeKind.EXPERT and mixture.given_expert() is not None:
            return 0
        own = (
            [self._attack_option(name) for name in ATTACK_EPOCHS] if kind is NodeKind.POISONED_EXPERT else []
        )
        given = [int(epochs) for epochs in own if epochs is not None]
        return sum(given) if given else mixture.expert_train.epochs

    @property
    def share(self) -> float:
        """Share of the training images per epoch: 1, or for a defended run the share that the defender has."""
        if not self.spec.defenses:
            return 1.0
        if "training-set" in defenses.registry.lookup(self.spec.defenses[-1].name).needs:
            return 1.0
        return float(self._defense_option("clean_fraction") or 0.0)

    @property
    def passes(self) -> float:
        """Number of passes over the training images to which the run amounts.

        An attack that weights harm processes a harmful query with every image, so these epochs count twice.
        """
        total = self.total_epochs * self.share
        weights_harm = kind_of(self.spec) is NodeKind.POISONED_EXPERT and self._attack_option("harm_weight")
        return total + (float(self._attack_option("epochs") or 0) if weights_harm else 0.0)

    def _defense_epochs(self) -> int:
        part = self.spec.defenses[-1]
        known = defenses.registry.options(part.name)
        if self._defense_option("retrain") is False:
            return 0
        given = {name: self._defense_option(name) for name in DEFENSE_EPOCHS if name in known}
        recipe = {name: max(1, self.spec.train.epochs // part) for name, part in DEFENSE_EPOCHS.items()}
        return sum(recipe[name] if epochs is None else int(epochs) for name, epochs in given.items())

    def _defense_option(self, name: str) -> Any:
        return _option(defenses.registry, self.spec.defenses[-1], name)

    def _attack_option(self, name: str) -> Any:
        assert self.spec.attack is not None
        return _option(attacks.registry, self.spec.attack, name)


def _option(registry: Registry[Any], part: PartSpec, name: str) -> Any:
    """Return the value of a part's option; None if the part has no such option."""
    option = registry.options(part.name).get(name)
    return part.options.get(name, option.default if option else None)


def read_plan(specs: Sequence[RunSpec], output: Path, known: Collection[str] = ()) -> list[Planned]:
    """Read the progress of each run from its folder.

    Args:
        specs: The runs.
        output: Folder of run folders.
        known: Digests of runs that are finished elsewhere.

    Raises:
        RecordError: A record is damaged.
    """
    return [_finished(spec) if spec.digest in known else _read(spec, output / spec.name) for spec in specs]


def _finished(spec: RunSpec) -> Planned:
    run = Planned(spec, "finished")
    return replace(run, epochs=run.total_epochs)


def _read(spec: RunSpec, path: Path) -> Planned:
    folder = RunFolder(path)
    if not folder.exists:
        return Planned(spec, "missing")
    record = folder.read()
    status, epochs = status_of(folder, record), len(record.history)
    if status == "finished":
        return _finished(spec)
    if status == "failed":
        return Planned(spec, status, epochs, error=record.error)
    sign = read_life_sign(path)
    if status == "running" and sign is not None and is_fresh(sign):
        done = sign["start"] + sign["seen"] / max(1, sign["images"])
        return Planned(spec, status, done, sign["images_per_second"], sign["images"])
    # The record of a killed run can be older than its last life sign.
    return Planned(spec, status, max(epochs, (sign or {}).get("epoch", 0)))


def with_place(suite: Suite, options: Mapping[str, Any], device: str | None) -> Suite:
    """Return the suite with other data set options (root, download) or another device, with the same digests."""

    def move(spec: RunSpec) -> RunSpec:
        return replace(spec.with_data(**options), device=device or spec.device)

    return replace(suite, cells=tuple(replace(cell, spec=move(cell.spec)) for cell in suite.cells))
