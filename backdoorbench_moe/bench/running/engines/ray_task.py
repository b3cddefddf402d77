"""The Ray task of a job, in a worker process on any node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.running.engines.ray_folders import Files, deliver, is_finished, own_folder, take
from backdoorbench_moe.bench.running.worker import Job, Outcome, work
from backdoorbench_moe.data.roots import VARIABLE as DATA_VARIABLE
from backdoorbench_moe.ops.image_rows import MEMORY_VARIABLE
from backdoorbench_moe.paths import CACHE_VARIABLE
from backdoorbench_moe.process.allocator import keep_freed_memory
from backdoorbench_moe.records import RunFolder

# Variables for the folder of data, the cache of decoded images, and the number of images kept in memory.
VARIABLES = (DATA_VARIABLE, CACHE_VARIABLE, MEMORY_VARIABLE)
SECONDS_TO_ANSWER = 5.0


@dataclass(frozen=True)
class Home:
    """Location of the driver, by which a task can tell whether it shares the output folder.

    Attributes:
        token: A file in the driver's output folder.
        folder: The driver's current folder; relative paths in a spec start there.
        variables: The driver's values of those of `VARIABLES` that are set.
    """

    token: str
    folder: str
    variables: Mapping[str, str]

    @classmethod
    def here(cls, token: Path) -> Home:
        """Return this process as the driver."""
        return cls(str(token), str(Path.cwd()), {n: os.environ[n] for n in VARIABLES if n in os.environ})

    def enter(self) -> None:
        """In a task, change to the driver's folder, if it exists, and set the variables that are not set."""
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        os.environ.update({**self.variables, **os.environ})


def make_run(
    job: Job, home: Home, threads: int, stop: Any, key: str, inputs: Mapping[str, Any]
) -> tuple[Outcome, Files | None]:
    """Execute a run in a worker process; its files are returned if the output folder is not the driver's.

    Args:
        job: The run to execute.
        home: Location of the driver.
        threads: Number of torch threads.
        stop: The actor that tells tasks to stop.
        key: Name of this submission.
        inputs: References to the files of the runs that it depends on, by name.
    """
    import ray
    import torch

    # A task that waits for Ray in its main thread releases its CPU to another task in the meantime.
    with ThreadPoolExecutor(1) as asking:

        def is_wanted() -> bool:
            return not asking.submit(_is_told, stop, key).result()

        if job.is_late or not is_wanted():
            return Outcome(job.run_spec.name, "waiting"), None
        keep_freed_memory()
        torch.set_num_threads(threads)
        home.enter()
        token = Path(home.token)
        if token.is_file():
            return work(job, is_wanted), None
        own = replace(job, output=str(own_folder(token.name)))
        for name, files in inputs.items():
            folder = RunFolder(Path(own.output) / name)
            if not is_finished(folder):
                # Another task on this node may also be writing it.
                deliver(folder, ray.get(files), wait=True)
        outcome = work(own, is_wanted)
    ended = outcome.status in ("finished", "failed")
    return outcome, take(own.folder) if ended else {}


def _is_told(stop: Any, key: str) -> bool:
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.get(stop.is_told.remote(key), timeout=SECONDS_TO_ANSWER))
    except RayError:  # The actor's node was lost; it restarts on another one.
        return False
