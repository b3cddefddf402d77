"""Jobs handed to Ray and their outcomes, on the driver's side and in the tasks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.running.engines.agenda import Agenda
from backdoorbench_moe.bench.running.worker import Job, Outcome, work
from backdoorbench_moe.data.roots import VARIABLE as DATA_VARIABLE
from backdoorbench_moe.engine.files import FILES
from backdoorbench_moe.engine.graph import needs
from backdoorbench_moe.errors import BbmoeError, RecordError
from backdoorbench_moe.ops.image_rows import MEMORY_VARIABLE
from backdoorbench_moe.paths import CACHE_VARIABLE
from backdoorbench_moe.process.allocator import keep_freed_memory
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
# Where the data are, where decoded images are kept, and how many of them may be held in memory.
VARIABLES = (DATA_VARIABLE, CACHE_VARIABLE, MEMORY_VARIABLE)
RETRIES = 3
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 60.0
SECONDS_TO_TIDY = 30.0
SECONDS_TO_ANSWER = 5.0

Files = dict[str, bytes]


@dataclass(frozen=True)
class Resources:
    """What every run asks of Ray.

    Attributes:
        cpus: CPUs, and torch threads.
        gpus: Share of a GPU, in [0, 1]; a run on the CPU does not ask for it.
        reuse_process: Whether a process may make several runs, one after the other.
    """

    cpus: int
    gpus: float
    reuse_process: bool


@dataclass(frozen=True)
class Home:
    """Where the driver runs, so that a task can tell whether it shares the output folder.

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
        """In a task, go to the driver's folder, if there is such a folder, and set the variables that are not set."""
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        os.environ.update({**self.variables, **os.environ})


@dataclass(frozen=True)
class _Try:
    """A job as handed to Ray for the `number`-th time, from 0."""

    job: Job
    number: int = 0

    @property
    def name(self) -> str:
        return self.job.run_spec.name

    @property
    def key(self) -> str:
        return f"{self.name}#{self.number}"


class Flight:
    """The jobs of one call.

    A job stops at its deadline by the clock of its node. The latest deadline is also checked by the driver's clock, so
    that no job waits for a node after it, or continues because of a wrong clock. Ray's own retries are not used: a
    process that is killed for memory would be retried without end.

    Args:
        jobs: The jobs.
        resources: What each asks of Ray.
        limit: Number of jobs that are handed to Ray at a time; None for all.
    """

    def __init__(self, jobs: Sequence[Job], resources: Resources, limit: int | None) -> None:
        import ray

        jobs = [replace(job, output=str(Path(job.output).absolute())) for job in jobs]
        self.agenda = Agenda(jobs)
        self.limit, self.resources = limit, resources
        deadlines = [job.deadline for job in jobs if job.deadline is not None]
        self.deadline = max(deadlines) if len(deadlines) == len(jobs) else None
        self.running: dict[Any, _Try] = {}
        # Files of finished runs that others need, in Ray's store.
        self._stored: dict[Path, Any] = {}
        self.is_over = self.sends_files = False
        self.token = uuid.uuid4().hex
        self.outputs = {job.output for job in jobs}
        for output in self.outputs:
            write_token(output, self.token)
        self._task = ray.remote(
            num_cpus=resources.cpus,
            max_retries=0,
            max_calls=0 if resources.reuse_process else 1,
        )(make_run)
        self.stop = _make_stop()

    def outcomes(self) -> Iterator[Outcome]:
        """Each outcome as it comes. At the deadline what runs is stopped, and what waits is left."""
        import ray

        while self.agenda or self.running:
            if not self.is_over and self.deadline is not None and time.time() >= self.deadline:
                self._halt()
            if self.is_over:
                yield from (Outcome(job.run_spec.name, "waiting") for job in self.agenda.take_all())
            while self.limit is None or len(self.running) < self.limit:
                if (job := self.agenda.take()) is None:
                    break
                self._hand_over(_Try(job))
            if not self.running:
                continue
            done, _ = ray.wait(list(self.running), timeout=SECONDS_BETWEEN_LOOKS)
            for reference in done:
                job = self.running[reference].job
                if outcome := self._collect(reference):
                    yield from self.agenda.note(job, outcome)

    def close(self) -> None:
        """Stop what runs, at its next step, and leave nothing behind."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            if self.running:
                self._halt()
                ray.wait(list(self.running), num_returns=len(self.running), timeout=SECONDS_TO_STOP)
            ray.kill(self.stop)
            if self.sends_files:
                _tidy_nodes(self.token)
        for output in self.outputs:
            _token_path(output, self.token).unlink(missing_ok=True)

    def _hand_over(self, one: _Try) -> None:
        home = Home.here(_token_path(one.job.output, self.token))
        gpus = 0 if one.job.run_spec.device == "cpu" else self.resources.gpus
        task = self._task.options(num_gpus=gpus, name=one.name)
        inputs = self._inputs(one.job)
        self.running[task.remote(one.job, home, self.resources.cpus, self.stop, one.key, inputs)] = one

    def _inputs(self, job: Job) -> dict[str, Any]:
        """References to the files of the runs that a run needs, by name, for a node without the output folder.

        Ray sends them only when the node asks for them.
        """
        import ray

        if sum(node["Alive"] for node in ray.nodes()) < 2:
            return {}
        output = Path(job.output)
        for needed in needs(job.run_spec).values():
            folder = RunFolder(output / needed.name)
            if folder.path not in self._stored and _is_finished(folder):
                self._stored[folder.path] = ray.put(_read_files(folder))
        wanted = {needed.name: output / needed.name for needed in needs(job.run_spec).values()}
        return {name: self._stored[path] for name, path in wanted.items() if path in self._stored}

    def _halt(self) -> None:
        """Tell the tasks that have started to stop; take back the others."""
        import ray

        self.is_over = True
        started = ray.get(self.stop.tell.remote())
        for reference, one in self.running.items():
            if one.key not in started:
                ray.cancel(reference)

    def _collect(self, reference: Any) -> Outcome | None:
        """The outcome of a task that ended; None if it was lost and is tried again."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        one = self.running.pop(reference)
        try:
            outcome, files = ray.get(reference)
            if files is not None:
                self.sends_files = True
                _deliver(one.job.folder, files)
            return outcome
        except TaskCancelledError:
            return Outcome(one.name, "waiting")
        except RayTaskError as error:
            return one.job.fail(f"{type(error.cause).__name__}: {error.cause}")
        except BbmoeError as error:
            return one.job.fail(str(error))
        except RayError as error:
            if self.is_over:
                return Outcome(one.name, "interrupted")
            if one.number < RETRIES:
                self._hand_over(replace(one, number=one.number + 1))
                return None
            reason = (str(error).splitlines() or [""])[0]
            return one.job.fail(f"its worker was lost {RETRIES + 1} times: {type(error).__name__}: {reason}")


def make_run(
    job: Job, home: Home, threads: int, stop: Any, key: str, inputs: Mapping[str, Any]
) -> tuple[Outcome, Files | None]:
    """In a worker process: make a run. Its files come along where the output folder is not the driver's.

    Args:
        job: The run to make.
        home: Where the driver runs.
        threads: Number of torch threads.
        stop: The actor that tells tasks to stop.
        key: Name of this try.
        inputs: References to the files of the runs that it needs, by name.
    """
    import ray
    import torch

    # A task that waits for Ray in its main thread gives its CPU away to another one meanwhile.
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
        own = replace(job, output=str(_own_folder(token.name)))
        for name, files in inputs.items():
            folder = RunFolder(Path(own.output) / name)
            if not _is_finished(folder):
                # Another task on this node may be writing it, too.
                _deliver(folder, ray.get(files), wait=True)
        outcome = work(own, is_wanted)
    ended = outcome.status in ("finished", "failed")
    return outcome, _take(own.folder) if ended else {}


def _is_told(stop: Any, key: str) -> bool:
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.get(stop.is_told.remote(key), timeout=SECONDS_TO_ANSWER))
    except RayError:  # Its node was lost, and it starts again on another.
        return False


def write_token(output: str, token: str) -> None:
    """Leave a file in the output folder that a task can look for. Raises RecordError if that cannot be."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        _token_path(output, token).touch()
    except OSError as error:
        raise RecordError(f"output folder {output}: {error.strerror}") from error


def _token_path(output: str, token: str) -> Path:
    return Path(output) / f".ray-{token}"


def _own_folder(name: str) -> Path:
    """A node's own output folder; nobody can have made it before, as its name cannot be guessed."""
    folder = Path(tempfile.gettempdir()) / f"bbmoe{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _read_files(folder: RunFolder) -> Files:
    """The files of a run that ended."""
    copies = [f"{FILES}/{path.name}" for path in sorted((folder.path / FILES).glob("*"))]
    names = [name for name in (*copies, *SENT) if (folder.path / name).is_file()]
    return {name: (folder.path / name).read_bytes() for name in names}


def _take(folder: RunFolder) -> Files:
    """The files of a run that ended, which are then deleted here."""
    files = _read_files(folder)
    shutil.rmtree(folder.path, ignore_errors=True)
    return files


def _is_finished(folder: RunFolder) -> bool:
    """Whether a folder holds a finished run."""
    return folder.exists and folder.read().status == "finished"


def _deliver(folder: RunFolder, files: Files, *, wait: bool = False) -> None:
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


def _make_stop() -> Any:
    """The actor that tells tasks to stop, on whatever node they are."""
    import ray

    # Here, so that it travels by value: its process need not import torch.
    class Stop:
        def __init__(self) -> None:
            self.told, self.started = False, set[str]()

        def tell(self) -> set[str]:
            self.told = True
            return self.started

        def is_told(self, key: str) -> bool:
            self.started.add(key)
            return self.told

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=RETRIES)(Stop).remote()


def _tidy_nodes(token: str) -> None:
    """Delete what is left in the nodes' own folders: runs that others were built on, or that were stopped."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_tidy)
    there = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            _token_path("", token).name
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(there, num_returns=len(there), timeout=SECONDS_TO_TIDY)


def _tidy(name: str) -> None:
    shutil.rmtree(_own_folder(name), ignore_errors=True)
