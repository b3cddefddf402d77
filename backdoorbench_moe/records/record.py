"""The record: everything that is known of a run, as a typed schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypedDict

from backdoorbench_moe.config import RunSpec, spec_from_dict

SCHEMA_VERSION = 3


class Input(TypedDict):
    """A run that this one was made from.

    role: such as "parent". run: name of its folder. digest: its spec's digest. sha256: of its model file. The last two
    are None in runs that were made before they were recorded.
    """

    role: str
    run: str
    digest: str | None
    sha256: str | None


class NamedFile(TypedDict):
    """A file that an option of the spec names.

    key: the option's, such as "trigger.image". name: of the file, without its folder. sha256: of its content. bytes:
    its size. kept: the copy's path in the run folder; None for a large file.
    """

    key: str
    name: str
    sha256: str
    bytes: int
    kept: str | None


class Stage(TypedDict):
    """The model at the end of a stage of a defense: name, metrics, and the seconds that the stage took."""

    name: str
    metrics: dict[str, dict[str, float]]
    seconds: float


class Judged(TypedDict):
    """A judgement of a defense.

    about: "input", "sample" (of the training set), "class", "expert" or "model". scores: by name; None where they are
    in scores.npz, or are not kept. threshold: a score beyond it is suspicious; None where there is none. suspicious:
    names of what is, or their number where they are in scores.npz. reason: one sentence. details: anything else.
    """

    about: str
    scores: dict[str, float | None] | None
    threshold: float | None
    suspicious: list[str] | int
    reason: str
    details: dict[str, Any]


class DataFacts(TypedDict):
    """The data of a run.

    digest: SHA-256 over images and labels. fingerprint: SHA-256 over names, sizes and times of the files they were read
    from; None for data without files. chance: share of the most frequent class of the test images, in percent.
    """

    name: NotRequired[str]
    classes: list[str]
    image_size: int
    digest: str
    train_images: NotRequired[int]
    test_images: NotRequired[int]
    clean_images: NotRequired[int]
    fingerprint: NotRequired[str | None]
    chance: NotRequired[float]


class Environment(TypedDict):
    """What a run was made with."""

    packages: dict[str, str]
    device: str
    precision: str
    threads: int


@dataclass
class Record:
    """Everything that is known of a run, as `record.json` holds it.

    Attributes:
        spec: The spec as a plain dict; see `run_spec`.
        digest: The spec's digest.
        status: "running", "interrupted", "failed" or "finished".
        data: See `DataFacts`.
        parts: Values that the options of model, trigger, applicator and defense took.
        poison: Number of poisoned images `n`, rate and target; cover and noise if there are such; None if clean.
        metrics: Metrics by name (see `backdoorbench_moe.metrics`): {"value": percent, "n": images, "low": ..,
            "high": ..}, the interval Wilson's at 95%, or that of Newcombe for `auroc`; `cad` has no interval.
        history: One entry for each epoch of training or tuning.
        timing: Seconds of the parts of the work.
        seeds: Seeds by purpose.
        environment: Versions, hardware, precision, threads; see `Environment`.
        inputs: The runs that this one was made from.
        files: The files that options of the spec name.
        model_sha256: SHA-256 of the model file, from when the run was finished.
        near_chance: Whether the clean accuracy is near chance, so that ASR says nothing about the trigger; None in
            runs from before this was recorded.
        clean_twin: Name of the folder of the clean run that it is compared with.
        stages: Of a defended run: "before", then each stage; the last has the run's own metrics.
        judgements: What a defense judged.
        error: Why the run failed.
        schema_version: Version of this schema.
    """

    spec: dict[str, Any]
    digest: str
    status: str = "running"
    data: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    poison: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    files: list[NamedFile] = field(default_factory=list)
    model_sha256: str | None = None
    near_chance: bool | None = None
    clean_twin: str | None = None
    stages: list[Stage] = field(default_factory=list)
    judgements: list[Judged] = field(default_factory=list)
    error: str | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def for_spec(cls, spec: RunSpec) -> Record:
        """A record of a run that is about to start."""
        return cls(spec=spec.to_dict(), digest=spec.digest)

    @property
    def run_spec(self) -> RunSpec:
        """The spec that the run was made from."""
        return spec_from_dict(self.spec)

    @property
    def parent(self) -> str | None:
        """Name of the folder of the run that was defended; None for an undefended run."""
        return next((each["run"] for each in self.inputs if each["role"] == "parent"), None)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values that any JSON reader takes: numbers that are not finite become None."""
        values: dict[str, Any] = _finite(asdict(self))
        return values

    def to_json(self, indent: int | None = None) -> str:
        """The record as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
