"""Transfer of run folders between nodes."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from backdoorbench_moe.engine.files import FILES
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import (
    MODEL,
    POISON,
    PROBE,
    RECORD,
    SCORES,
    TRIGGER,
    RunFolder,
    write_atomically,
)

# Files of a run folder that are sent to the driver, in addition to the copies of named files. The record comes last, as
# it states that the others exist.
SENT = (POISON, PROBE, SCORES, TRIGGER, MODEL, RECORD)
SECONDS_TO_TIDY = 30.0

Files = dict[str, bytes]


def write_token(output: str, token: str) -> None:
    """Write a file to the output folder by which tasks recognise it. Raises RecordError if it cannot be written."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        token_path(output, token).touch()
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error


def token_path(output: str, token: str) -> Path:
    return Path(output) / f".ray-{token}"


def own_folder(name: str) -> Path:
    """Return a node's own output folder; no one else can have created it, as its name cannot be guessed."""
    folder = Path(tempfile.gettempdir()) / f"bbmoe{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def read_files(folder: RunFolder) -> Files:
    """Return the files of a run that has ended."""
    copies = [f"{FILES}/{path.name}" for path in sorted((folder.path / FILES).glob("*"))]
    names = [name for name in (*copies, *SENT) if (folder.path / name).is_file()]
    return {name: (folder.path / name).read_bytes() for name in names}


def take(folder: RunFolder) -> Files:
    """Return the files of a run that has ended, and delete them here."""
    files = read_files(folder)
    shutil.rmtree(folder.path, ignore_errors=True)
    return files


def is_finished(folder: RunFolder) -> bool:
    """Whether a folder contains a finished run."""
    return folder.exists and folder.read().status == "finished"


def deliver(folder: RunFolder, files: Files, *, wait: bool = False) -> None:
    """Write files from another node into a run folder, unless it has the finished run.

    Args:
        folder: The run folder.
        files: Contents of the files, by name.
        wait: Whether to wait if another process uses the folder; if False, this is an error.

    Raises:
        RecordError: A file does not belong into a run folder, or another process uses the folder.
    """
    if unknown := sorted(name for name in files if not _belongs(name)):
        raise RecordError(f"run folder {folder.path}: a worker sent unknown files: {unknown}")
    if not files:
        return
    with folder.lock(wait=(lambda: None) if wait else None):
        if is_finished(folder):  # Written by another process while this one waited; it may be in use.
            return
        for name, content in files.items():  # In the order of reading: the record last.
            (folder.path / name).parent.mkdir(exist_ok=True)
            write_atomically(folder.path / name, partial(_put, content))
        folder.drop_checkpoint()


def _belongs(name: str) -> bool:
    """Whether a file with this name may be written into a run folder; paths that lead out of it are not allowed."""
    copy = name.removeprefix(f"{FILES}/")
    return name in SENT or (copy != name and Path(copy).name == copy and copy not in ("", ".", ".."))


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def tidy_nodes(token: str) -> None:
    """Delete leftovers in the nodes' own folders: runs on which others depended, or that were stopped."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_tidy)
    there = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            token_path("", token).name
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(there, num_returns=len(there), timeout=SECONDS_TO_TIDY)


def _tidy(name: str) -> None:
    shutil.rmtree(own_folder(name), ignore_errors=True)
