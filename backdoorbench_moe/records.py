"""The run folder: the record, the model, the poisoned indices, the checkpoint; whole or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from backdoorbench_moe.config import RunSpec, spec_from_dict
from backdoorbench_moe.errors import ConfigError, RecordError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SCHEMA_VERSION = 2
# Fields that came with a version; a record of an older one does without them.
ADDED_IN = {2: {"parent", "stages", "scores", "verdict"}}
RECORD, MODEL, POISON, PROBE, CHECKPOINT, LOCK = (
    "record.json",
    "model.safetensors",
    "poison.npz",
    "probe.npz",
    "checkpoint",
    ".lock",
)
KINDS = {"spec": dict, "metrics": dict, "history": list, "data": dict, "environment": dict, "status": str}
KINDS |= {"parts": dict, "timing": dict, "seeds": dict, "stages": list, "scores": dict, "verdict": dict}
# What the readers of a record take for granted: numbers in a metric and an epoch, texts and numbers elsewhere.
METRIC_KEYS = {"value", "n"}
EPOCH_KEYS = {"epoch", "loss", "train_accuracy", "lr", "seconds"}
DATA_KINDS = {"digest": str, "classes": list, "image_size": int}
ENVIRONMENT_KINDS = {"packages": dict, "device": str, "precision": str, "threads": int}


@dataclass
class Record:
    """All that is known of a run, as `record.json` holds it.

    status: running, interrupted, failed or finished. metrics: `ba`, `asr`, `cad` as {"value": percent,
    "n": images, "low": .., "high": ..} (Wilson 95%; `cad` without low and high). history: one entry an
    epoch.

    Of a defended run, too: metrics `ra`, the share of the images of `asr` that are called what they are;
    parent, folder name of the run it was made from; stages, [{"name": .., "metrics": {..}, "seconds": ..}],
    "before" first, the last with the run's own metrics; history, the epochs of its tuning. scores and
    verdict: what a defense that judges gave, by what it judges: "sample", "class", "expert" or "model".

    Behind an input filter: `tpr` and `fpr`, the shares of triggered and of clean images it rejects, and
    `auroc` of its scores, n of both kinds, low and high; `ba`, `asr` and `ra` of the same images, a rejected one
    being neither right nor fooled. They are a sample of the test images: see n. The model in the folder is
    without its filter.
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
    clean_twin: str | None = None
    parent: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def for_spec(cls, spec: RunSpec) -> Record:
        """A fresh record of a run about to start."""
        return cls(spec=spec.to_dict(), digest=spec.digest)

    @property
    def run_spec(self) -> RunSpec:
        """The spec the run was made from."""
        return spec_from_dict(self.spec)


class RunFolder:
    """One run on disk. Every file is written beside its place and moved there, so none is ever half there."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a record lies here. Raises RecordError for a path that cannot be (too long, no access)."""
        try:
            return (self.path / RECORD).is_file()
        except OSError as error:
            raise RecordError(f"run folder {self.path}: {error.strerror}") from error

    def read(self) -> Record:
        """Read and check the record.

        Raises RecordError if this is no run folder, or the record is damaged or from another version.
        """
        if not self.path.is_dir():
            raise RecordError(f"run folder {self.path}: expected a folder with a {RECORD}, found none")
        file = self.path / RECORD
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"run folder {self.path}: expected a {RECORD} in it, found none") from None
        except OSError as error:
            raise RecordError(f"record {file}: {error.strerror}") from error
        except ValueError as error:
            raise RecordError(f"record {file}: damaged: {error}") from error
        return parse_record(values, file)

    def write(self, record: Record) -> None:
        """Write the record. Raises RecordError if the folder cannot be written."""
        text = json.dumps(asdict(record), indent=2, allow_nan=True) + "\n"
        self._write(RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def save_model(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write the weights as safetensors, with `metadata` in the header."""
        self._write(MODEL, lambda path: _save_tensors(tensors, path, metadata))

    def load_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read weights and header of the model. Raises RecordError if missing or no safetensors file."""
        return _load_tensors(self.path / MODEL)

    def save_poison(self, indices: np.ndarray) -> None:
        """Write the indices of the poisoned training images, (n,) int64."""
        self._save_arrays(POISON, {"indices": indices})

    def load_poison(self) -> np.ndarray:
        """Read the indices of the poisoned training images. Raises RecordError."""
        arrays = self._load_arrays(POISON, "poison indices")
        if "indices" not in arrays:
            raise RecordError(f"poison indices {self.path / POISON}: missing or damaged (no 'indices' in it)")
        return arrays["indices"]

    def save_probe(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write what a probe saw; see `engine.probe`."""
        self._save_arrays(PROBE, arrays)

    def load_probe(self) -> dict[str, np.ndarray] | None:
        """Read what a probe saw; None where the run has none. Raises RecordError if it is damaged."""
        return self._load_arrays(PROBE, "probe") if (self.path / PROBE).exists() else None

    def _save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        import numpy as np

        def put(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        self._write(name, put)

    def _load_arrays(self, name: str, what: str) -> dict[str, np.ndarray]:
        import numpy as np

        try:
            with np.load(self.path / name, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise RecordError(f"{what} {self.path / name}: missing or damaged ({error})") from error

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write tensors and JSON state as one file, in place of the one before."""
        self._make(self.path / CHECKPOINT)
        header = {"state": json.dumps(state)}
        self._write(f"{CHECKPOINT}/state.safetensors", lambda path: _save_tensors(tensors, path, header))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the last checkpoint; None where there is none. Raises RecordError if it is damaged."""
        file = self.path / CHECKPOINT / "state.safetensors"
        if not file.exists():
            return None
        tensors, header = _load_tensors(file)
        try:
            return tensors, json.loads(header["state"])
        except (KeyError, ValueError) as error:
            raise RecordError(f"checkpoint {file}: damaged; delete it to train from the start") from error

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint of a finished run."""
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the folder for this process, creating it if need be; the system lets go if we are killed.

        wait: called twice a second for as long as another process holds it, and may raise; by default that
        raises RecordError naming the other process.
        """
        self._make(self.path)
        try:
            file = (self.path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise RecordError(f"output folder {self.path}: {error.strerror}") from error
        with file:
            if not _try_lock(file.fileno()):
                if wait is None:
                    file.seek(0)
                    raise RecordError(
                        f"run folder {self.path}: another process ({file.read().strip() or 'unknown'}) works in it"
                    )
                wait()
                while not _try_lock(file.fileno()):
                    time.sleep(0.5)
                    wait()
            file.seek(0)
            file.truncate()
            file.write(f"pid {os.getpid()}")
            file.flush()
            yield

    def _make(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"output folder {path}: {error.strerror}") from error

    def _write(self, name: str, put: Callable[[Path], object]) -> None:
        write_atomically(self.path / name, put)


def write_atomically(target: Path, put: Callable[[Path], object]) -> None:
    """Let `put` write a file beside `target`, then move it there. Raises RecordError if the disk refuses."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        put(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise RecordError(f"output {target}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Such as a network disk without locks: nobody else holds it.
        raise RecordError(f"output folder: cannot be locked: {error.strerror}") from error
    return True


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise RecordError(f"model file {file}: not found")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecordError(f"model file {file}: expected a safetensors file: {error}") from error


def parse_record(values: object, file: Path) -> Record:
    """A record from its JSON values. Raises RecordError, naming `file`, if it is damaged or of another version."""
    known = {item.name: item for item in fields(Record)}
    if not isinstance(values, dict) or "schema_version" not in values:
        raise RecordError(f"record {file}: damaged: expected a 'schema_version' in it")
    values = _upgrade(values, file)
    missing, extra = known.keys() - values.keys(), values.keys() - known.keys()
    if missing or extra:
        raise RecordError(f"record {file}: damaged: missing {sorted(missing)}, unknown {sorted(extra)}")
    for name, kind in KINDS.items():
        if not isinstance(values[name], kind):
            raise RecordError(f"record {file}: damaged: {name!r} is no {kind.__name__}")
    record = Record(**values)
    if damage := _find_damage(record):
        raise RecordError(f"record {file}: damaged: {damage}")
    try:
        digest = record.run_spec.digest
    except ConfigError as error:
        raise RecordError(f"record {file}: damaged: {error}") from error
    if digest != record.digest:
        raise RecordError(f"record {file}: damaged: its digest is {record.digest}, its spec's is {digest}")
    return record


def _upgrade(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """A record of an older version as one of this: what it had not yet takes its default."""
    version = values["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise RecordError(f"record {file}: expected schema version 1 to {SCHEMA_VERSION}, found {version!r}")
    added = {name for since, names in ADDED_IN.items() if since > version for name in names}
    if early := sorted(added & values.keys()):
        raise RecordError(f"record {file}: damaged: unknown to schema version {version}: {early}")
    fresh = asdict(Record(spec={}, digest=""))
    return {**values, **{name: fresh[name] for name in added}, "schema_version": SCHEMA_VERSION}


def _find_damage(record: Record) -> str | None:
    """What is wrong inside a record's fields; None where nothing is."""
    for stage in record.stages:
        if not isinstance(stage, dict) or not _is_stage(stage):
            return f"'stages': expected a name, metrics and seconds, found {stage!r}"
    metrics = [record.metrics, *(stage["metrics"] for stage in record.stages)]
    rows = [("metrics", row, METRIC_KEYS) for group in metrics for row in group.values()]
    rows += [("history", row, EPOCH_KEYS) for row in record.history]
    for name, row, keys in [*rows, ("timing", record.timing, set())]:
        if not isinstance(row, dict) or not keys <= row.keys() or not all(map(_is_number, row.values())):
            return f"{name!r}: expected numbers {sorted(keys) or ''}, found {row!r}"
    if any("low" in row and "high" not in row for group in metrics for row in group.values()):
        return "'metrics': an interval without its high end"
    for name, part, kinds in (
        ("data", record.data, DATA_KINDS),
        ("environment", record.environment, ENVIRONMENT_KINDS),
    ):
        for key, kind in kinds.items():
            if (part or record.status == "finished") and not isinstance(part.get(key), kind):
                return f"{name!r}: expected {key!r}, a {kind.__name__}, found {part.get(key)!r}"
    if record.poison is not None and not (isinstance(record.poison, dict) and "n" in record.poison):
        return f"'poison': expected 'n' in it, found {record.poison!r}"
    if not all(isinstance(text, str | None) for text in (record.clean_twin, record.parent, record.error)):
        return "'clean_twin', 'parent' or 'error' is no text"
    if record.status == "finished" and "ba" not in record.metrics:
        return "'metrics': a finished run without 'ba'"
    return None


def _is_stage(stage: dict[str, Any]) -> bool:
    named = isinstance(stage.get("name"), str) and isinstance(stage.get("metrics"), dict)
    return named and _is_number(stage.get("seconds"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
