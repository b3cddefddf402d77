"""Jobs handed to Ray and their outcomes, on the driver's side."""

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
        """References to the files of the runs that a run needs, by name, for a node without the output folder.

        Ray sends them only when the node asks for them.
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
