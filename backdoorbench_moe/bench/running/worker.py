"""Work of a worker process: one run after the other, with a life sign on disk."""

from __future__ import annotations

import _thread
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from backdoorbench_moe.bench.running.life_sign import LIFE_SIGN
from backdoorbench_moe.config import RunSpec, spec_from_dict
from backdoorbench_moe.engine.progress.observer import Observer, StopRun
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.plugins import describe_error
from backdoorbench_moe.process.signal_handlers import is_importing
from backdoorbench_moe.records import Record, RunFolder, write_atomically
from backdoorbench_moe.records.status import is_held

SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_BETWEEN_LOOKS = 1.0

# The runner of this process, kept so that runs on the same data read the data once.
_runners: dict[str, Runner] = {}
# Whether `work` is executing a run that has not been told to stop.
_working = False


@dataclass(frozen=True)
class Job:
    """A run to execute, as plain values that can be sent to any process or machine.

    Attributes:
        spec: The run's spec.
        output: Folder of run folders.
        deadline: `time.time()` at which to stop at the latest; None for no limit.
        wait: Whether to wait if another process is executing the run.
    """

    spec: Mapping[str, Any]
    output: str
    deadline: float | None = None
    wait: bool = True

    @property
    def run_spec(self) -> RunSpec:
        """The spec of the run."""
        return spec_from_dict(self.spec)

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder(Path(self.output) / self.run_spec.name)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed before the start."""
        return self.deadline is not None and time.time() >= self.deadline

    def fail(self, message: str) -> Outcome:
        """Record and return the outcome of a worker that died or never started."""
        spec = self.run_spec
        record_failure(self.folder, spec, message)
        return Outcome(spec.name, "failed", message)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        name: The run's name.
        status: "finished" (by this job), "found" (another process finished it in the meantime), "failed", "interrupted"
            (the next call continues from its last epoch), "waiting" (the deadline passed before it started), or "held"
            (another process is executing it, and the job does not wait for it).
        error: Error message of a failed job.
    """

    name: str
    status: str
    error: str | None = None


def work(job: Job, alive: Callable[[], bool] = lambda: True) -> Outcome:
    """Execute one run. An error becomes the job's outcome and is recorded; only KeyboardInterrupt is raised.

    Args:
        job: The run to execute.
        alive: Called about once a second; when it returns False, the run is interrupted.
    """
    global _working
    spec = job.run_spec
    if not job.wait and is_held(job.folder):
        return Outcome(spec.name, "held")
    watch = _Watch(job.folder, job.deadline, alive)
    try:
        _working = True
        with _stopped_when(watch.is_over):
            runner = _runner(spec, job.output, watch)
            runner.compare(runner.finish(spec, wait=True))
    except StopRun:
        return Outcome(spec.name, "interrupted")
    except Exception as error:
        # Catch any error, including those of plug-ins: the other runs of the suite must continue.
        return job.fail(describe_error(error))
    finally:
        _working = False
        watch.clear()
    return Outcome(spec.name, "found" if watch.was_found else "finished")


def forget_runners() -> None:
    """Forget the data that this process keeps for further runs, so that data sets are read again."""
    _runners.clear()


def stop_working() -> None:
    """Interrupt the run that this process is executing, if any; for use in a signal handler.

    A run is interrupted only once: a second exception, such as by a repeated signal, would be raised while the first is
    being recorded.

    Raises:
        StopRun: A run is being executed and has not been told to stop before.
    """
    global _working
    if _working:
        _working = False
        raise StopRun


@contextlib.contextmanager
def _stopped_when(is_over: Callable[[], bool]) -> Iterator[None]:
    """Look once a second, from another thread, whether the block is to be interrupted, and call `stop_working` then.

    An observer can interrupt a run between training steps only, but a defense may search for minutes without any.
    Outside of the main thread, where Python cannot handle signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            if is_over():
                _thread.interrupt_main(signal.SIGUSR1)

    def stop(_: int, frame: FrameType | None) -> None:
        # An exception during an import may be lost; the next look comes in a second.
        if not (ended.is_set() or is_importing(frame)):
            stop_working()

    before = signal.signal(signal.SIGUSR1, stop)
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()
        signal.signal(signal.SIGUSR1, before)


def memory_of(job: Job) -> tuple[int, int]:
    """Return the peak device memory of a few steps of a run, and the free memory before, in bytes; 0 on a CPU."""
    import torch

    from backdoorbench_moe.bench.running.estimate import measure_speed

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    spec = job.run_spec
    return measure_speed(spec, _runner(spec, job.output, Observer()).workplace.data).peak_bytes, free


def record_failure(folder: RunFolder, spec: RunSpec, message: str) -> None:
    """Record that a run failed, unless this is already recorded or the run is finished."""
    try:
        with folder.lock():
            record = folder.read() if folder.exists else Record.for_spec(spec)
            if record.status == "finished" or (record.status == "failed" and record.error == message):
                return
            record.status, record.error = "failed", message
            folder.write(record)
    except (RecordError, OSError):
        # The folder cannot be read or written, so only the outcome reports the error.
        return


def _runner(spec: RunSpec, output: str, observer: Observer) -> Runner:
    key = json.dumps([spec.dataset.to_dict(), spec.device, spec.precision, output], sort_keys=True)
    if key not in _runners:
        _runners.clear()  # Keep only one data set in memory.
        _runners[key] = Runner(spec, output)
    runner = _runners[key]
    runner.workplace.observer = observer
    return runner


class _Watch(Observer):
    """Writes life signs into the run folder, and stops the run at its deadline."""

    def __init__(self, folder: RunFolder, deadline: float | None, alive: Callable[[], bool]) -> None:
        self.folder, self.deadline, self.alive = folder, deadline, alive
        self.was_found = False
        self._sign: dict[str, Any] = {}
        self._started = self._told = 0.0
        self._seen = 0

    def on_found(self, folder: str) -> None:
        """Note that another process finished the run itself, and not one that it depends on."""
        self.was_found = self.was_found or Path(folder) == self.folder.path

    def on_wait(self, folder: str) -> None:
        """Stop waiting at the deadline."""
        self._stop_if_over()

    def on_train_start(self, name: str, *, epochs: int, done: int, images: int, noun: str = "image") -> None:
        """Note what is trained: the run itself, or before it has a folder, the run that it defends."""
        self._sign = {"epochs": epochs, "epoch": done, "images": images, "start": done}
        self._started, self._seen = time.time(), 0
        self._tell()
        self._stop_if_over()

    def on_step(self, images: int, loss: float | None) -> None:
        """Count images; write a life sign once a second."""
        self._seen += images
        if time.time() - self._told > SECONDS_BETWEEN_SIGNS:
            self._tell()
            self._stop_if_over()

    def on_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Stop if the remaining time is too short for another epoch, whose work would be lost."""
        self._sign["epoch"] = epoch
        if epoch < self._sign["epochs"]:
            self._stop_if_over(needed=row["seconds"])

    def clear(self) -> None:
        """Remove the life sign if this run wrote one; a run that only waited did not."""
        if self._sign:
            with contextlib.suppress(OSError):
                (self.folder.path / LIFE_SIGN).unlink()

    def is_over(self, needed: float = 0.0) -> bool:
        """Return whether the deadline is less than `needed` seconds away, or the run is no longer wanted."""
        over = self.deadline is not None and time.time() + needed > self.deadline
        return over or not self.alive()

    def _stop_if_over(self, needed: float = 0.0) -> None:
        if self.is_over(needed):
            stop_working()  # From here on, signals do not interrupt the run again.
            raise StopRun

    def _tell(self) -> None:
        self._told = time.time()
        rate = self._seen / max(self._told - self._started, 1e-9)
        text = json.dumps({**self._sign, "seen": self._seen, "images_per_second": rate, "time": self._told})
        # A disk that is temporarily full must not end the training.
        with contextlib.suppress(RecordError, OSError):
            self.folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self.folder.path / LIFE_SIGN, lambda path: path.write_text(text, encoding="utf-8")
            )
