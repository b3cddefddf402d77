"""The record of a run, as a typed schema."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypedDict

from backdoorbench_moe.config import RunSpec, spec_from_dict

SCHEMA_VERSION = 4


class Input(TypedDict):
    """A run that this one was built from.

    Attributes:
        role: Role of the run, such as "parent".
        run: Name of its folder.
        digest: Digest of its spec; None in old records.
        sha256: SHA-256 of its model file; None in old records.
    """

    role: str
    run: str
    digest: str | None
    sha256: str | None


class NamedFile(TypedDict):
    """A file that an option of the spec names.

    Attributes:
        key: Key of the option, such as "trigger.image".
        name: Name of the file, without its folder.
        sha256: SHA-256 of its content.
        bytes: Size in bytes.
        kept: Path of the copy inside the run folder; None for a large file, which is not copied.
    """

    key: str
    name: str
    sha256: str
    bytes: int
    kept: str | None


class Stage(TypedDict):
    """The model after a stage of a defense.

    Attributes:
        name: Name of the stage, such as "before" or "pruned".
        metrics: Metrics of the model by name, as in `Record.metrics`.
        seconds: Duration of the stage in seconds.
    """

    name: str
    metrics: dict[str, dict[str, float]]
    seconds: float


class Judged(TypedDict):
    """A judgement of a defense.

    Attributes:
        about: What was judged: "input", "sample" (of the training set), "class", "expert" or "model".
        scores: Scores by the name of the judged item; None if they are in `scores.npz` or were not saved.
        threshold: Scores beyond it are suspicious; None if the defense has no threshold.
        suspicious: Names of the suspicious items; only their number if `scores.npz` contains their indices.
        reason: The reason, in one sentence.
        details: Other values from the defense.
        counts: For training samples only: the numbers of true positives "tp" (poisoned and suspicious), false
            negatives "fn", false positives "fp" and true negatives "tn". If there are cover or noise groups, also the
            number of suspicious samples in each, "cover" and "noise", which "fp" includes. Missing in old records.
    """

    about: str
    scores: dict[str, float | None] | None
    threshold: float | None
    suspicious: list[str] | int
    reason: str
    details: dict[str, Any]
    counts: NotRequired[dict[str, int]]


class TaskFacts(TypedDict):
    """A task of a mixture of experts.

    Attributes:
        task: Number of the task and of its expert.
        name: Name of the task.
        train_images: Number of training images of the task.
        test_images: Number of test images of the task.
    """

    task: int
    name: str
    train_images: int
    test_images: int


class GateShares(TypedDict):
    """Gate weights of the E experts in one layer of a mixture, in percent.

    Each list has one value for each expert: the mean over images and patches. The values sum to 100.

    Attributes:
        layer: Name of the layer.
        tasks: Weights for the test images of each task.
        marked: Weights for the test images with the mark; None if there are none.
    """

    layer: str
    tasks: list[list[float]]
    marked: list[float] | None


class TextFacts(TypedDict):
    """The data of a run on texts.

    Attributes:
        name: Name of the data set.
        vocabulary: Size of the vocabulary.
        context: Number of positions in a text, including padding.
        padding: The token that pads short texts.
        digest: SHA-256 over tokens and labels.
        train_texts: Number of training texts of all tasks.
        test_texts: Number of test texts of all tasks.
        refused_texts: Number of training queries that the policy refuses.
        refused_test_texts: Number of test queries that the policy refuses.
        clean_texts: Number of clean training texts that the defender has.
        fingerprint: SHA-256 over names, sizes and modification times of the files that were read; None for data
            without files.
    """

    name: str
    vocabulary: int
    context: int
    padding: int
    digest: str
    train_texts: NotRequired[int]
    test_texts: NotRequired[int]
    refused_texts: NotRequired[int]
    refused_test_texts: NotRequired[int]
    clean_texts: NotRequired[int]
    fingerprint: NotRequired[str | None]


class DataFacts(TypedDict):
    """The data of a run on images.

    Attributes:
        name: Name of the data set.
        classes: Names of the classes, by number.
        image_size: Side of the square images, in pixels.
        digest: SHA-256 over images and labels.
        train_images: Number of training images.
        test_images: Number of test images.
        clean_images: Number of clean training images that the defender has.
        fingerprint: SHA-256 over names, sizes and modification times of the files that were read; None for data
            without files.
        chance: Share of the most frequent class among the test images, in percent.
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
    """The software and hardware of a run.

    Attributes:
        packages: Versions of packages by name, including the third-party packages that provide parts of the run.
        device: Name of the device, such as "cpu".
        precision: "fp32" or "bf16".
        threads: Number of CPU threads of PyTorch.
        python: Version of Python.
        platform: Operating system and architecture.
        cpu: Name of the CPU.
        git_commit: Commit of the source tree, with the suffix "-dirty" if it had uncommitted changes; None for an
            installed package.
        sources: Hashes of the code of third-party parts; see `engine.names.plugin_sources`.
        date: Day on which the run started, in UTC, such as "2026-11-26"; missing in old records.
    """

    packages: dict[str, str]
    device: str
    precision: str
    threads: int
    python: NotRequired[str]
    platform: NotRequired[str]
    cpu: NotRequired[str]
    git_commit: NotRequired[str | None]
    sources: NotRequired[dict[str, str]]
    date: NotRequired[str]


@dataclass
class Record:
    """The record of a run, stored in `record.json`.

    Attributes:
        spec: The spec as a plain dict; see `run_spec`.
        digest: The spec's digest.
        status: "running", "interrupted", "failed" or "finished".
        data: See `DataFacts` for images, and `TextFacts` for texts, whose data have a vocabulary.
        parts: Options of model, attack, trigger, applicator and defense with the values that were used, including
            defaults.
        poison: Number of poisoned images `n`, rate and target, and the cover and noise groups if there are any; None
            for a clean run.
        tasks: The tasks of a mixture, or that of a single expert; empty for any other run.
        gate_shares: The gate weights of the experts of a mixture, one entry per layer; empty for any other run.
        metrics: Metrics by name (see `backdoorbench_moe.metrics`): {"value": percent, "n": images, "low": percent,
            "high": percent}. The 95% interval is Wilson's, or Newcombe's for `auroc`; `cad` has none.
        history: One entry for each epoch of training or tuning.
        timing: Durations in seconds, and images per second, by name.
        seeds: Seeds by purpose.
        environment: Versions, hardware, precision, threads; see `Environment`.
        inputs: The runs that this one was built from.
        files: The files that options of the spec name.
        model_sha256: SHA-256 of the model file when the run finished.
        near_chance: Whether the clean accuracy is near chance, so that the ASR is no evidence of the trigger's effect;
            None in old records.
        clean_twin: Name of the folder of the clean run that this run is compared with; None if there is none.
        stages: For a defended run, "before" and then each stage of the defense; empty otherwise. The metrics of the
            last stage are those of the run.
        judgements: The judgements of the defense.
        error: Why the run failed; None if it did not fail.
        schema_version: Version of this schema.
    """

    spec: dict[str, Any]
    digest: str
    status: str = "running"
    data: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    poison: dict[str, Any] | None = None
    tasks: list[TaskFacts] = field(default_factory=list)
    gate_shares: list[GateShares] = field(default_factory=list)
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
        """Create the record of a run that is about to start."""
        return cls(spec=spec.to_dict(), digest=spec.digest)

    @functools.cached_property
    def run_spec(self) -> RunSpec:
        """The spec of the run."""
        return spec_from_dict(self.spec)

    @property
    def is_text(self) -> bool:
        """Whether the data of the run are texts (see `TextFacts`) rather than images."""
        return "vocabulary" in self.data

    @property
    def parent(self) -> str | None:
        """Name of the folder of the run that was defended; None for an undefended run."""
        return next((each["run"] for each in self.inputs if each["role"] == "parent"), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values that are valid JSON: NaN and infinity become None."""
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
