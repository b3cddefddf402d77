"""Stores the results of the checks of an audit, so that finished checks are not run again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.auditing.check import Check, Measured
from backdoorbench_moe.auditing.subject import Keep, in_memory
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.plain import plain
from backdoorbench_moe.records import write_atomically
from backdoorbench_moe.records.folder import DAMAGE

CHECKS = "checks"


class Store:
    """Results of the checks of one audit, stored on disk if there is a folder.

    Files of another subject or of another version of a check are ignored and overwritten. Commands use separate folders
    for different subjects, see `place.py`.

    Args:
        folder: The folder of the audit, created at the first write; None to store nothing.
        digest: Identifies the subject, see `subject_digest`.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self.folder, self.digest = None if folder is None else folder / CHECKS, digest

    def load(self, check: Check) -> tuple[Measured, float] | None:
        """Return the result of a check and its duration in seconds; None if it has not run."""
        values = self._load_values(check)
        try:
            score = float(values["score"])
            found = Measured(score, str(values["reason"]), dict(values["details"]))
            return (found, float(values["seconds"])) if math.isfinite(score) else None
        except (ValueError, KeyError, TypeError):
            return None

    def load_reason(self, check: Check) -> str | None:
        """Return why a check could not be run; None if it has not been tried, or has a result."""
        reason = self._load_values(check).get("not_tested")
        return reason if isinstance(reason, str) else None

    def _load_values(self, check: Check) -> Mapping[str, Any]:
        """Return the values in the file of a check; {} without a file of this subject and version."""
        values = None if self.folder is None else read_values(self.folder / f"{check.name}.json")
        own = values is not None and (values.get("subject"), values.get("version")) == (
            self.digest,
            check.version,
        )
        return values if values is not None and own else {}

    def save(self, check: Check, found: Measured, seconds: float) -> None:
        """Write the result of a check. Raises RecordError if the file cannot be written."""
        values = {
            "score": found.score,
            "reason": found.reason,
            "details": as_json(found.details),
            "seconds": seconds,
        }
        self._save_values(check, values)

    def save_reason(self, check: Check, reason: str) -> None:
        """Write why a check could not be run, for later reports. If it is chosen again, it is tried again."""
        self._save_values(check, {"not_tested": reason})

    def _save_values(self, check: Check, values: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        known = {"subject": self.digest, "check": check.name, "version": check.version}
        text = json.dumps({**known, **values}, indent=1, allow_nan=False) + "\n"
        self._write(f"{check.name}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def keep(self) -> Keep:
        """Return a `Keep` that also loads arrays of earlier calls from disk."""
        memory = in_memory()

        def make_or_load(name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            found = self._load_arrays(name)
            if found is None:
                found = make()
                self._save_arrays(name, found)
            return found

        return lambda name, make: memory(name, lambda: make_or_load(name, make))

    def _load_arrays(self, name: str) -> Mapping[str, Tensor] | None:
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                arrays = dict(file)
            if str(arrays.pop("subject")) != self.digest:
                return None
            return {key: torch.from_numpy(values) for key, values in arrays.items()}
        except (*DAMAGE, KeyError):
            return None

    def _save_arrays(self, name: str, arrays: Mapping[str, Tensor]) -> None:
        if self.folder is None:
            return
        values = {key: tensor.detach().cpu().numpy() for key, tensor in arrays.items()}
        self._write(f"{name}.npz", partial(_put_arrays, {**values, "subject": np.array(self.digest)}))

    def _write(self, name: str, put: Callable[[Path], object]) -> None:
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"audit folder {self.folder}: {error.strerror}") from error
        write_atomically(self.folder / name, put)


def read_values(file: Path) -> dict[str, Any] | None:
    """Return the values in the file of a check; None if it cannot be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _put_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def as_json(value: Any) -> Any:
    """Convert a value to JSON values. NaN and infinity become None."""
    value = plain(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def subject_digest(tensors: Mapping[str, Tensor | None], **settings: object) -> str:
    """Return the SHA-256 of a subject: its weights, images and everything else that a score depends on.

    Args:
        tensors: Tensors by name; None for those that are not given.
        **settings: Other values, which JSON can represent.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(name.encode())
        if tensor is not None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
