"""Runs side by side in processes of this machine, each pinned to a GPU where there are any."""

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
from multiprocessing import resource_tracker
from typing import Any

from backdoorbench_moe.bench.worker import Job, Outcome, memory_of, work
from backdoorbench_moe.errors import ConfigError

# glibc gives freed tensors back to the system and asks for them again at every step; kept, the small
# pMoE trained about a tenth faster on the CPU (one look: 1,650 against 1,520 images/s, two processes). Read at
# a process's start.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


# A guess, not measured on a GPU yet: benchmarks/speed/gpu.py finds how many side by side are fastest.
MOST_ON_A_GPU = 4
# What CUDA itself and the libraries take beside tensors, and how much of a card may be filled.
CONTEXT_BYTES = 1 << 30
FILL = 0.9


class LocalEngine:
    """`workers` processes; each lives as long as the engine runs, and is replaced if it dies.

    workers: None for one on a CPU, and on GPUs for as many as fit (see `runs_that_fit`). gpus: CUDA devices;
    worker i sees the one at i modulo their number, and no other. Without any, the workers share the CPU's
    cores evenly. Raises ConfigError below one worker.
    """

    def __init__(self, workers: int | None = None, *, gpus: Sequence[str] = ()) -> None:
        if workers is not None and workers < 1:
            raise ConfigError.expected("--workers", "at least 1", workers)
        self.workers, self.gpus = workers or 1, tuple(gpus)
        self._measure = workers is None and bool(gpus)

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Make the runs; see `Engine.run`."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        # Without a lock: a worker killed while it holds one would stop all others.
        stop = multiprocessing.get_context("spawn").RawValue(ctypes.c_bool, False)
        if self._measure and jobs:
            self.workers = len(self.gpus) * self._fit(jobs[0], stop)
        workers = min(self.workers, len(jobs))
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="bench") as threads:
            for number in range(workers):
                threads.submit(self._keep_busy, number, waiting, done, stop)
            try:
                for _ in jobs:
                    yield done.get()
            finally:
                stop.value = True

    def _keep_busy(
        self, number: int, waiting: queue.SimpleQueue[Job], done: queue.SimpleQueue[Outcome], stop: Any
    ) -> None:
        """Hand jobs to one process until none is left; the engine has such a thread for each process."""
        # Processes inherit it: Ctrl-C is the engine's, which tells them to stop, also while they still start.
        # (What keeps track of shared memory lets the signal through again where it is started.)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pool = None
        while not stop.value:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            if job.is_late:
                done.put(Outcome(job.run_spec.name, "waiting"))
                continue
            try:
                pool = pool or self._start(number, stop)
                done.put(pool.submit(work, job, _is_wanted).result())
            except BrokenProcessPool:
                # Killed for memory, or a crash in a library: this run's error, and a new process for the next.
                done.put(_lost(job, stop, "the worker process died (killed, or out of memory?)"))
                pool = None
            except BaseException as error:
                # Whatever it is, as no process can be started: without an outcome the engine would wait for ever.
                done.put(_lost(job, stop, f"{type(error).__name__}: {error}"))
        if pool is not None:
            pool.shutdown()

    def _fit(self, job: Job, stop: Any) -> int:
        """How many such runs one GPU holds, from a few of its steps in a process of their own."""
        try:
            with self._start(0, stop) as pool:
                return runs_that_fit(*pool.submit(memory_of, job).result())
        except Exception:
            return 1  # Such as one that does not fit at all: the run itself says so.

    def _start(self, number: int, stop: Any) -> ProcessPoolExecutor:
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        for key, value in KEEP_MEMORY.items():
            os.environ.setdefault(key, value)
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(threads, gpu, stop))


def _lost(job: Job, stop: Any, message: str) -> Outcome:
    """The outcome of a job without one: no failure where all were to stop, as by a Ctrl-C."""
    return Outcome(job.run_spec.name, "interrupted") if stop.value else job.fail(message)


_stop: Any = None


def _prepare(threads: int, gpu: str | None, stop: Any) -> None:
    """In a new worker: its device, its threads, and whom it listens to."""
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A worker of a killed engine must not go on: the next call would find its runs taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # Whatever it was doing: files are written whole, and runs go on from their last epoch.


def _is_wanted() -> bool:
    """Whether the engine has not been stopped."""
    return not _stop.value


def runs_that_fit(needed: int, free: int) -> int:
    """How many runs of `needed` bytes of tensors go into `free` bytes of a GPU: 1 to MOST_ON_A_GPU."""
    return max(1, min(MOST_ON_A_GPU, int(FILL * free) // (needed + CONTEXT_BYTES)))


def visible_gpus() -> list[str]:
    """The CUDA devices this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]
