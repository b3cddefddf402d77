"""Run folders: reading and writing their files, and a lock so that only one process at a time works on a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records.atomic import write_atomically
from backdoorbench_moe.records.locking import hold
from backdoorbench_moe.records.reading import parse_record
from backdoorbench_moe.records.record import Record

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RECORD, MODEL, TRIGGER, POISON, PROBE, SCORES, CHECKPOINT, LOCK = (
    "record.json",
    "model.safetensors",
    "trigger.safetensors",
    "poison.npz",
    "probe.npz",
    "scores.npz",
    "checkpoint",
    ".lock",
)
# Errors of `np.load` for a damaged file: RuntimeError for zip features that are not supported, TypeError for an array
# that is not in a zip file, MemoryError for a shape that the file announces, but does not contain.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, TypeError, MemoryError, BadZipFile, zlib.error)


class RunFolder:
    """The folder of a run.

    All files except the lock are written atomically: to a temporary file, which is then renamed.

    Args:
        path: Path of the folder. It need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether the folder has a record.

        Raises:
            RecordError: The path is too long or cannot be accessed.
        """
        try:  # Not Path.is_file, which hides all errors since Python 3.14.
            return stat.S_ISREG((self.path / RECORD).stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RecordError(f"run folder {self.path}: {error.strerror}") from error

    def read(self) -> Record:
        """Read and check the record. A record with an older schema version is converted.

        Raises:
            RecordError: The folder or the record does not exist, or the record cannot be read, is damaged or has an
                unknown schema version.
        """
        if not self.path.is_dir():
            found = (
                "got a file (bbmoe import turns weights into a run)" if self.path.exists() else "found none"
            )
            raise RecordError(f"run folder {self.path}: expected a folder with a {RECORD}, {found}")
        file = self.path / RECORD
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            runs = sorted(path.parent.name for path in self.path.glob(f"*/{RECORD}"))
            inside = f"; it contains run folders, such as {runs[0]}" if runs else ""
            raise RecordError(
                f"run folder {self.path}: expected a {RECORD} in it, found none{inside}"
            ) from None
        except OSError as error:
            raise RecordError(f"record {file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"record {file}: damaged: {error}") from error
        return parse_record(values, file)

    def write(self, record: Record) -> None:
        """Write the record. Raises RecordError if the folder cannot be written."""
        text = record.to_json(indent=2) + "\n"
        self._write(RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def save_model(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write the weights of the model as a safetensors file with `metadata` in its header.

        Raises:
            RecordError: The file cannot be written.
        """
        self._write(MODEL, lambda path: _save_tensors(tensors, path, metadata))

    def load_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read the weights of the model and the metadata in the header of the model file.

        Raises:
            RecordError: The file does not exist or is not a safetensors file.
        """
        return _load_tensors(self.path / MODEL, "model file")

    def model_metadata(self) -> dict[str, str]:
        """Read only the metadata in the header of the model file. Raises RecordError as `load_tensors`."""
        return _load_tensors(self.path / MODEL, "model file", weights=False)[1]

    @property
    def model_sha256(self) -> str | None:
        """SHA-256 of the model file, in hexadecimal; None if the file does not exist.

        Raises:
            RecordError: The file cannot be read.
        """
        return self._sha256(MODEL, "model file")

    def save_trigger(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of a learned trigger. Raises RecordError if the file cannot be written."""
        self._write(TRIGGER, lambda path: _save_tensors(tensors, path, {}))

    def load_trigger(self) -> dict[str, Tensor]:
        """Read what `save_trigger` wrote. Raises RecordError if the file does not exist or is damaged."""
        return _load_tensors(self.path / TRIGGER, "trigger file")[0]

    @property
    def trigger_sha256(self) -> str | None:
        """SHA-256 of the trigger file, in hexadecimal; None if the file does not exist.

        Raises:
            RecordError: The file cannot be read.
        """
        return self._sha256(TRIGGER, "trigger file")

    def _sha256(self, name: str, what: str) -> str | None:
        try:
            with (self.path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"{what} {self.path / name}: {error.strerror}") from error

    def save_poison(self, groups: Mapping[str, np.ndarray]) -> None:
        """Write the indices of the training images that the attacker changed.

        Args:
            groups: (n,) int64 indices by group: "indices" (the poison group), "cover" or "noise". Empty groups except
                "indices" are not written.
        """
        self._save_arrays(POISON, {k: v for k, v in groups.items() if len(v) or k == "indices"})

    def load_poison(self, group: str = "indices") -> np.ndarray:
        """Read the indices of the training images in a group.

        Args:
            group: "indices" (the poison group), "cover" or "noise".

        Returns:
            (n,) int64 indices; empty if the file does not contain the group.

        Raises:
            RecordError: The file does not exist or is damaged.
        """
        import numpy as np

        arrays = self._load_arrays(POISON, "poison indices")
        if "indices" not in arrays:
            raise RecordError(f"poison indices {self.path / POISON}: missing or damaged (no 'indices' in it)")
        found = arrays.get(group, np.empty(0, np.int64))
        if found.ndim != 1 or found.dtype != np.int64:
            raise RecordError(
                f"poison indices {self.path / POISON}: damaged: expected int64 indices, found {found.dtype} of shape "
                f"{found.shape} as {group!r}"
            )
        return found

    def save_scores(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write scores of a defense that are too many for the record."""
        self._save_arrays(SCORES, arrays)

    def load_scores(self) -> dict[str, np.ndarray]:
        """Read what `save_scores` wrote. Raises RecordError if the file does not exist or is damaged."""
        return self._load_arrays(SCORES, "scores")

    def save_probe(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the predictions and the routing recorded by a probe; see `engine.makers.probe`."""
        self._save_arrays(PROBE, arrays)

    def load_probe(self) -> dict[str, np.ndarray] | None:
        """Read what `save_probe` wrote; None if the file does not exist. Raises RecordError if it is damaged."""
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
        except DAMAGE as error:
            raise RecordError(f"{what} {self.path / name}: missing or damaged ({error})") from error

    def keep(self, name: str, source: Path) -> None:
        """Copy a file into the run folder.

        Args:
            name: Path of the copy, relative to the run folder.
            source: The file.

        Raises:
            RecordError: The copy cannot be written.
        """
        self._make((self.path / name).parent)
        self._write(name, functools.partial(shutil.copyfile, source))

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint of tensors and JSON values, which replaces the previous one."""
        self._make(self.path / CHECKPOINT)
        header = {"state": json.dumps(state)}
        self._write(f"{CHECKPOINT}/state.safetensors", lambda path: _save_tensors(tensors, path, header))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the checkpoint; None if it does not exist. Raises RecordError if it is damaged."""
        file = self.path / CHECKPOINT / "state.safetensors"
        if not file.exists():
            return None
        try:
            tensors, header = _load_tensors(file, "checkpoint")
            return tensors, json.loads(header["state"])
        except (KeyError, ValueError, RecursionError, RecordError) as error:
            raise RecordError(f"checkpoint {file}: damaged; delete it to train from the start") from error

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint, and model files that killed processes left half-written. Errors are ignored."""
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)
        with contextlib.suppress(OSError):
            for partial in self.path.glob(f".{MODEL}.*.partial"):
                partial.unlink()

    @contextlib.contextmanager
    def lock(self, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the folder's lock inside the block. The folder is created if it does not exist.

        The operating system releases the lock if the process is killed.

        Args:
            wait: Function that is called twice a second while another process holds the lock; it may raise an exception
                to stop waiting. If None, it is an error if another process holds the lock.

        Raises:
            RecordError: Another process holds the lock, or the folder cannot be written or locked.
        """
        self._make(self.path)
        with hold(self.path / LOCK, f"run folder {self.path}", wait=wait):
            yield

    def _make(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"output folder {path}: {error.strerror}") from error

    def _write(self, name: str, put: Callable[[Path], object]) -> None:
        write_atomically(self.path / name, put)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        # The format does not support shared tensors: one with two names, such as a tied embedding, is written twice.
        plain[name] = own.clone() if own.untyped_storage().data_ptr() in places else own
        places.add(plain[name].untyped_storage().data_ptr())
    try:
        # Not serialised in memory first: a checkpoint of a language model has gigabytes.
        save_file(plain, path, metadata=dict(metadata))
        _sort_header(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _sort_header(path: Path) -> None:
    """Sort the metadata of a safetensors file in place, since the library writes it in random order.

    Equal models then have equal files. A file consists of the length of its header (8 bytes), the header as JSON,
    padded with spaces to a multiple of 8 bytes, and the tensors.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "sorting does not change the length"
        file.seek(8)
        file.write(text)


def _load_tensors(file: Path, what: str, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise RecordError(f"{what} {file}: not found")
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys() if weights else ()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    # The library also raises Python's errors, such as TypeError for sizes that are no 64-bit integers.
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise RecordError(f"{what} {file}: expected a safetensors file: {reason}") from error
