"""Run folders between nodes: the files of a run that are sent, taken and delivered."""

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

# The files of a run folder that are sent to the driver, with the copies of named files. The record comes last: it says
# that the others are there.
SENT = (POISON, PROBE, SCORES, TRIGGER, MODEL, RECORD)
SECONDS_TO_TIDY = 30.0

Files = dict[str, bytes]


def write_token(output: str, token: str) -> None:
    """Leave a file in the output folder that a task can look for. Raises RecordError if that cannot be."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        token_path(output, token).touch()
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error


def token_path(output: str, token: str) -> Path:
    return Path(output) / f".ray-{token}"


def own_folder(name: str) -> Path:
    """A node's own output folder; nobody can have made it before, as its name cannot be guessed."""
    folder = Path(tempfile.gettempdir()) / f"bbmoe{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def read_files(folder: RunFolder) -> Files:
    """The files of a run that ended."""
    copies = [f"{FILES}/{path.name}" for path in sorted((folder.path / FILES).glob("*"))]
    names = [name for name in (*copies, *SENT) if (folder.path / name).is_file()]
    return {name: (folder.path / name).read_bytes() for name in names}


def take(folder: RunFolder) -> Files:
    """The files of a run that ended, which are then deleted here."""
    files = read_files(folder)
    shutil.rmtree(folder.path, ignore_errors=True)
    return files


def is_finished(folder: RunFolder) -> bool:
    """Whether a folder holds a finished run."""
    return folder.exists and folder.read().status == "finished"


def deliver(folder: RunFolder, files: Files, *, wait: bool = False) -> None:
    """Write files that came from elsewhere into a run folder.

    Args:
        folder: The run folder.
        files: Content of the files by name.
        wait: Whether to wait for another process that uses the folder; if False, this is an error.

    Raises:
        RecordError: A name has no place in a run folder, or another process uses the folder.
    """
    if unknown := sorted(name for name in files if not _belongs(name)):
        raise RecordError(f"run folder {folder.path}: a worker sent unknown files: {unknown}")
    if not files:
        return
    with folder.lock(wait=(lambda: None) if wait else None):
        for name, content in files.items():  # In the order in which they were taken: the record last.
            (folder.path / name).parent.mkdir(exist_ok=True)
            write_atomically(folder.path / name, partial(_put, content))
        folder.drop_checkpoint()


def _belongs(name: str) -> bool:
    """Whether a file of this name may be written into a run folder: no path that leads out of it."""
    copy = name.removeprefix(f"{FILES}/")
    return name in SENT or (copy != name and Path(copy).name == copy and copy not in ("", ".", ".."))


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def tidy_nodes(token: str) -> None:
    """Delete what is left in the nodes' own folders: runs that others were built on, or that were stopped."""
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
