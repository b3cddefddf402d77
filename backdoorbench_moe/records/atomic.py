"""Atomic writes: a file is either replaced completely or left unchanged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from backdoorbench_moe.errors import RecordError


def write_atomically(target: Path, put: Callable[[Path], object]) -> None:
    """Write a file with `put` under a temporary name, then rename it to `target`.

    Raises:
        RecordError: The file cannot be written.
    """
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
