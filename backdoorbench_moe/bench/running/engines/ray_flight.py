"""Jobs submitted to Ray and their outcomes, on the driver's side."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorbench_moe.bench.running.engines.agenda import Agenda
from backdoorbench_moe.bench.running.engines.ray_folders import (
    deliver,
    is_finished,
    read_files,
    tidy_nodes,
    token_path,
    write_token,
)
from backdoorbench_moe.bench.running.engines.ray_task import Home, make_run
from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.engine.graph import needs
from backdoorbench_moe.errors import BbmoeError
from backdoorbench_moe.records import RunFolder

RETRIES = 3
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 60.0


@dataclass(frozen=True)
class Resources:
    """Resources that every run requests from Ray.

    Attributes:
        cpus: Number of CPUs and torch threads.
        gpus: Share of a GPU, in [0, 1]; not requested for runs on the CPU.
        reuse_process: Whether a process may execute several runs, one after the other.
    """

    cpus: int
    gpus: float
    reuse_process: bool


@dataclass(frozen=True)
class _Try:
    """The `number`-th submission of a job to Ray, from 0."""

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

    A job stops at its deadline by the clock of its node. The driver also checks the latest deadline by its own clock,
    so that no job still waits for a node after it, or continues because of a wrong clock. Ray's own retries are not
    used, as a process that is killed for its memory use would be retried forever.

    Args:
        jobs: The jobs.
        resources: Resources that each job requests.
        limit: Maximum number of jobs submitted to Ray at a time; None for all.
    """

    def __init__(self, jobs: Sequence[Job], resources: Resources, limit: int | None) -> None:
        import ray

        jobs = [replace(job, output=str(Path(job.output).absolute())) for job in jobs]
        self.agenda = Agenda(jobs)
        self.limit, self.resources = limit, resources
        deadlines = [job.deadline for job in jobs if job.deadline is not None]
        self.deadline = max(deadlines) if len(deadlines) == len(jobs) else None
        self.running: dict[Any, _Try] = {}
        # Files of finished runs on which others depend, in Ray's object store.
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
        """Yield each outcome when it is known. At the deadline, running jobs are stopped, and waiting ones are left."""
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
        """Stop running jobs at their next step, and clean up."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            if self.running:
                self._halt()
                ray.wait(list(self.running), num_returns=len(self.running), timeout=SECONDS_TO_STOP)
            ray.kill(self.stop)
            if self.sends_files:
                tidy_nodes(self.token)
        for output in self.outputs:
            token_path(output, self.token).unlink(missing_ok=True)

    def _hand_over(self, one: _Try) -> None:
        home = Home.here(token_path(one.job.output, self.token))
        gpus = 0 if one.job.run_spec.device == "cpu" else self.resources.gpus
        task = self._task.options(num_gpus=gpus, name=one.name)
        inputs = self._inputs(one.job)
        self.running[task.remote(one.job, home, self.resources.cpus, self.stop, one.key, inputs)] = one

    def _inputs(self, job: Job) -> dict[str, Any]:
        """Return references to the files of the runs a run depends on, by name, for nodes without the output folder.

        Ray sends the files only when the node requests them.
        """
        import ray

        if sum(node["Alive"] for node in ray.nodes()) < 2:
            return {}
        output = Path(job.output)
        for needed in needs(job.run_spec).values():
            folder = RunFolder(output / needed.name)
            if folder.path not in self._stored and is_finished(folder):
                self._stored[folder.path] = ray.put(read_files(folder))
        wanted = {needed.name: output / needed.name for needed in needs(job.run_spec).values()}
        return {name: self._stored[path] for name, path in wanted.items() if path in self._stored}

    def _halt(self) -> None:
        """Tell started tasks to stop; cancel the others."""
        import ray

        self.is_over = True
        started = ray.get(self.stop.tell.remote())
        for reference, one in self.running.items():
            if one.key not in started:
                ray.cancel(reference)

    def _collect(self, reference: Any) -> Outcome | None:
        """Return the outcome of a task that has ended; None if it was lost and is retried."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        one = self.running.pop(reference)
        try:
            outcome, files = ray.get(reference)
            if files is not None:
                self.sends_files = True
                deliver(one.job.folder, files)
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


def _make_stop() -> Any:
    """Create the actor that tells tasks on any node to stop."""
    import ray

    # Defined here so that it is sent by value, and its process need not import torch.
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
