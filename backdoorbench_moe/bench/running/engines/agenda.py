"""Order of jobs: each after the jobs whose runs it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.engine.graph import needs

READY = ("finished", "found")


class Agenda:
    """A queue of jobs that respects their dependencies.

    A job is ready when no other job still has to execute a run that it depends on. The experts of a mixture, for
    example, wait for their base, so that two workers do not train it. Not thread-safe.

    Args:
        jobs: The jobs; ready jobs are handed out in this order.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        # By run folder, computed once, as reading a spec is slow.
        self._waiting: dict[Path, Job] = {}
        self._lacks: dict[Path, set[Path]] = {}
        for job in jobs:
            spec, output = job.run_spec, Path(job.output)
            self._waiting[output / spec.name] = job
            self._lacks[output / spec.name] = {output / needed.name for needed in needs(spec).values()}
        for lacking in self._lacks.values():
            lacking.intersection_update(self._waiting)

    def __len__(self) -> int:
        """Return the number of jobs that are not handed out."""
        return len(self._waiting)

    @property
    def has_ready(self) -> bool:
        """Whether a job can be handed out now."""
        return any(not self._lacks[path] for path in self._waiting)

    def take(self) -> Job | None:
        """Hand out the first ready job; None if no job is ready."""
        path = next((path for path in self._waiting if not self._lacks[path]), None)
        return None if path is None else self._waiting.pop(path)

    def take_all(self) -> list[Job]:
        """Remove and return all jobs, ready or not."""
        jobs = list(self._waiting.values())
        self._waiting.clear()
        return jobs

    def put_back(self, job: Job) -> None:
        """Return a job to the end of the queue."""
        self._waiting[job.folder.path] = job

    def note(self, job: Job, outcome: Outcome) -> Iterator[Outcome]:
        """Note the outcome of a job. Yields it, and the outcomes of the jobs that cannot be executed without its run.

        These fail if the job failed; otherwise they wait for the next call.
        """
        yield outcome
        made = job.folder.path
        if outcome.status in READY:
            for lacking in self._lacks.values():
                lacking.discard(made)
            return
        for path in [path for path in self._waiting if made in self._lacks[path]]:
            # A job that depends on several of the runs was already removed with the first.
            if (other := self._waiting.pop(path, None)) is not None:
                yield from self.note(other, _without(other, outcome))


def _without(job: Job, needed: Outcome) -> Outcome:
    """Return the outcome of a job that depends on a run that was not finished."""
    if needed.status == "failed":
        return job.fail(f"needs {needed.name}, which failed")
    return Outcome(job.run_spec.name, "waiting")
