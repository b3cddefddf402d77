"""What a suite still needs: which runs there are, which are missing, and how long those will take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.life_sign import is_fresh, read_life_sign
from backdoorbench_moe.bench.suite import Suite
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.records import RunFolder


@dataclass(frozen=True)
class Planned:
    """A run of the suite, and how far it is.

    Attributes:
        spec: The run's spec.
        status: A record's status, or "missing".
        epochs: Finished epochs.
        images_per_second: Speed of a run that is being made now; otherwise 0.
        images: Images in an epoch of a run that is being made now; otherwise 0.
        error: Why the run failed.
    """

    spec: RunSpec
    status: str
    epochs: float = 0.0
    images_per_second: float = 0.0
    images: int = 0
    error: str | None = None

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run; of a defended run those of its last defense, 0 if that has no such option."""
        return self.spec.train.epochs if not self.spec.defenses else int(self._defense_option("epochs") or 0)

    @property
    def share(self) -> float:
        """Share of the training images in an epoch: what the defender holds, for a defended run."""
        return 1.0 if not self.spec.defenses else float(self._defense_option("clean_fraction") or 0.0)

    def _defense_option(self, name: str) -> Any:
        defense = self.spec.defenses[-1]
        option = defenses.registry.options(defense.name).get(name)
        return defense.options.get(name, option.default if option else None)


def look(specs: Sequence[RunSpec], output: Path, known: Collection[str] = ()) -> list[Planned]:
    """Read from its folder how far each run is.

    Args:
        specs: The runs.
        output: Folder of run folders.
        known: Digests of runs that are finished elsewhere.

    Raises:
        RecordError: A record is damaged.
    """
    return [
        Planned(spec, "finished", spec.train.epochs)
        if spec.digest in known
        else _look(spec, output / spec.name)
        for spec in specs
    ]


def _look(spec: RunSpec, path: Path) -> Planned:
    folder = RunFolder(path)
    if not folder.exists:
        return Planned(spec, "missing")
    record = folder.read()
    if record.status in ("finished", "failed"):
        return Planned(spec, record.status, len(record.history), error=record.error)
    sign = read_life_sign(path)
    if sign is None or not is_fresh(sign):
        return Planned(spec, "interrupted", (sign or {}).get("epoch", len(record.history)))
    epochs = sign["start"] + sign["seen"] / max(1, sign["images"])
    return Planned(spec, "running", epochs, sign["images_per_second"], sign["images"])


def with_place(suite: Suite, options: Mapping[str, Any], device: str | None) -> Suite:
    """The suite with the data at another place (root, download) or on another device; digests stay."""

    def move(spec: RunSpec) -> RunSpec:
        return replace(spec.with_data(**options), device=device or spec.device)

    return replace(suite, cells=tuple(replace(cell, spec=move(cell.spec)) for cell in suite.cells))
