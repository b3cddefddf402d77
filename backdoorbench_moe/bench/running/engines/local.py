"""Parallel runs in processes on this machine, each on one GPU if there are GPUs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

from backdoorbench_moe.bench.running.engines.agenda import Agenda
from backdoorbench_moe.bench.running.worker import Job, Outcome, memory_of, stop_working, work
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.process.allocator import keep_freed_memory
from backdoorbench_moe.process.cores import usable_cores
from backdoorbench_moe.process.signal_handlers import outside_of_imports

# Signals that ask a worker to end: schedulers send SIGTERM to all processes of a job, a closed terminal sends SIGHUP.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# Not measured on a GPU yet: benchmarks/speed/gpu.py measures which number of parallel runs is fastest.
MOST_ON_A_GPU = 4
# Memory that CUDA and its libraries use in addition to tensors, and the share of a GPU's memory that may be used.
CONTEXT_BYTES = 1 << 30
FILL = 0.9
# Seconds between checks of an idle worker whether the engine was stopped.
SECONDS_BETWEEN_LOOKS = 0.5


class LocalEngine:
    """Worker processes on this machine; a worker that dies is replaced.

    Args:
        workers: Number of worker processes; None for one on a CPU, and for as many as fit on GPUs (see
            `runs_that_fit`).
        gpus: CUDA devices, assigned to the workers in turn; a worker sees no other device.
        threads: CPU threads per worker; None for an equal share of the cores.

    Raises:
        ConfigError: `workers` or `threads` is below 1.
    """

    def __init__(
        self, workers: int | None = None, *, gpus: Sequence[str] = (), threads: int | None = None
    ) -> None:
        for option, value in (("--workers", workers), ("--threads", threads)):
            if value is not None and value < 1:
                raise ConfigError.expected(option, "at least 1", value)
        self.threads = threads
        self.workers, self.gpus = workers or 1, tuple(gpus)
        self._measure = workers is None and bool(gpus)

    @property
    def threads_each(self) -> int:
        """Number of CPU threads per worker."""
        return self.threads or max(1, len(usable_cores()) // self.workers)

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Execute the runs; see `Engine.run`."""
        agenda = _SharedAgenda([replace(job, wait=False) for job in jobs])
        done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        # Without a lock, as a worker killed while holding it would block all others.
        stop = multiprocessing.get_context("spawn").RawValue(ctypes.c_bool, False)
        if self._measure and jobs:
            self.workers = len(self.gpus) * self._fit(jobs[0], stop)
        workers = min(self.workers, len(jobs))
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="bench") as threads:
            for number in range(workers):
                threads.submit(self._keep_busy, number, agenda, done, stop)
            try:
                for _ in jobs:
                    yield done.get()
            finally:
                stop.value = True

    def _keep_busy(
        self, number: int, agenda: _SharedAgenda, done: queue.SimpleQueue[Outcome], stop: Any
    ) -> None:
        """Hand jobs to one process until none is left; runs in one thread per process."""
        # Worker processes inherit the blocked signals. Ctrl-C stays blocked in them, as the engine tells them to stop;
        # the others are blocked until a worker can handle them (see `_prepare`).
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        # Start the process that tracks shared memory first, as starting it unblocks SIGINT and SIGTERM, which it
        # ignores. It does not ignore SIGHUP, but inherits the block.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING_SIGNALS})
        pool = None
        while (job := agenda.take(stop)) is not None:
            if job.is_late:
                agenda.note(job, Outcome(job.run_spec.name, "waiting"), done)
                continue
            try:
                pool = pool or self._start(number, stop)
                outcome = pool.submit(work, job, _is_wanted).result()
                if outcome.status == "held":
                    # Another engine is executing it. This one waits for it when no other job is left.
                    agenda.put_back(replace(job, wait=True))
                    continue
                agenda.note(job, outcome, done)
                if outcome.status == "interrupted":
                    # The signal may have been sent to this worker only, which would also stop the next run.
                    pool.shutdown()
                    pool = None
            except BrokenProcessPool:
                # Killed for its memory use, or crashed in a library: the run failed, and the next one gets a new
                # process.
                message = "the worker process died (killed, or out of memory?)"
                agenda.note(job, _lost(job, stop, message), done)
                pool = None
            except BaseException as error:
                # Any error, such as a process that cannot start; without an outcome, the engine would wait forever.
                agenda.note(job, _lost(job, stop, f"{type(error).__name__}: {error}"), done)
        if pool is not None:
            pool.shutdown()

    def _fit(self, job: Job, stop: Any) -> int:
        """Return how many such runs fit on one GPU, measured with a few steps in a separate process."""
        try:
            with self._start(0, stop) as pool:
                return runs_that_fit(*pool.submit(memory_of, job).result())
        except Exception:
            return 1  # A run that does not fit at all, for example, will fail with its own message.

    def _start(self, number: int, stop: Any) -> ProcessPoolExecutor:
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(self.threads_each, gpu, stop))


class _SharedAgenda:
    """An agenda for the threads of one engine.

    Args:
        jobs: The jobs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._agenda, self._changed = Agenda(jobs), threading.Condition()

    def take(self, stop: Any) -> Job | None:
        """Hand out the next job when it is ready; None if all are handed out, or if the engine was stopped.

        The last ready job waits if another engine is executing its run.
        """
        with self._changed:
            while not stop.value and self._agenda:
                if (job := self._agenda.take()) is not None:
                    return replace(job, wait=job.wait or not self._agenda.has_ready)
                self._changed.wait(SECONDS_BETWEEN_LOOKS)
        return None

    def put_back(self, job: Job) -> None:
        """Return a job whose run another engine is executing."""
        with self._changed:
            self._agenda.put_back(job)
            self._changed.notify_all()

    def note(self, job: Job, outcome: Outcome, done: queue.SimpleQueue[Outcome]) -> None:
        """Pass on the outcome of a job, and those of the jobs that cannot be executed without its run."""
        with self._changed:
            for each in self._agenda.note(job, outcome):
                done.put(each)
            self._changed.notify_all()


def _lost(job: Job, stop: Any, message: str) -> Outcome:
    """Return the outcome of a job whose worker returned none: interrupted if the engine was stopped, else failed."""
    return Outcome(job.run_spec.name, "interrupted") if stop.value else job.fail(message)


_stop: Any = None
_terminated = False


def _prepare(threads: int, gpu: str | None, stop: Any) -> None:
    """Set up a new worker process: its device, its threads and its signals."""
    global _stop
    _stop = stop
    for number in ENDING_SIGNALS:
        # A signal that is already ignored, such as SIGHUP under `nohup`, stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, outside_of_imports(_terminate))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    keep_freed_memory()
    import torch

    torch.set_num_threads(threads)


def _terminate(*_: object) -> None:
    """Stop the run of this worker; the handler of ENDING_SIGNALS."""
    global _terminated
    _terminated = True
    stop_working()


def _end_with_parent() -> None:
    """End this process if the engine's process was killed, so that its runs are not locked for the next call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # Safe at any time, as files are written atomically and runs continue from their last epoch.


def _is_wanted() -> bool:
    """Return whether neither the engine nor this worker was told to stop."""
    return not (_stop.value or _terminated)


def runs_that_fit(needed: int, free: int) -> int:
    """Return how many runs of `needed` bytes of tensors fit into `free` bytes of a GPU, from 1 to MOST_ON_A_GPU."""
    return max(1, min(MOST_ON_A_GPU, int(FILL * free) // (needed + CONTEXT_BYTES)))


def visible_gpus() -> list[str]:
    """List the CUDA devices that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]
