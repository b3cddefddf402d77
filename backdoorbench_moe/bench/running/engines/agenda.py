"""The order of jobs: each after those that make the runs it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.engine.graph import needs

READY = ("finished", "found")


class Agenda:
    """Jobs in the order in which they are handed out.

    A job is ready when every run that it needs is made, as far as other jobs make them: the experts of a mixture wait
    for their base, and no two workers train it. It is not thread-safe.

    Args:
        jobs: The jobs; their order is kept among those that are ready.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        # By the folder of the run, which is computed once: reading a spec takes time.
        self._waiting: dict[Path, Job] = {}
        self._lacks: dict[Path, set[Path]] = {}
        for job in jobs:
            spec, output = job.run_spec, Path(job.output)
            self._waiting[output / spec.name] = job
            self._lacks[output / spec.name] = {output / needed.name for needed in needs(spec).values()}
        for lacking in self._lacks.values():
            lacking.intersection_update(self._waiting)

    def __len__(self) -> int:
        """Number of jobs that are not handed out."""
        return len(self._waiting)

    @property
    def has_ready(self) -> bool:
        """Whether a job can be handed out now."""
        return any(not self._lacks[path] for path in self._waiting)

    def take(self) -> Job | None:
        """Hand out the first job that is ready; None if there is none now."""
        path = next((path for path in self._waiting if not self._lacks[path]), None)
        return None if path is None else self._waiting.pop(path)

    def take_all(self) -> list[Job]:
        """Hand out all jobs, ready or not, to drop them."""
        jobs = list(self._waiting.values())
        self._waiting.clear()
        return jobs

    def put_back(self, job: Job) -> None:
        """Take back a job that was handed out; it is the last now."""
        self._waiting[job.folder.path] = job

    def note(self, job: Job, outcome: Outcome) -> Iterator[Outcome]:
        """Note how a job ended. Yields the outcome, and those of the jobs that cannot be done without its run.

        They fail if it failed; otherwise they wait for the next call.
        """
        yield outcome
        made = job.folder.path
        if outcome.status in READY:
            for lacking in self._lacks.values():
                lacking.discard(made)
            return
        for path in [path for path in self._waiting if made in self._lacks[path]]:
            # One that needs several of the runs is already gone with the first.
            if (other := self._waiting.pop(path, None)) is not None:
                yield from self.note(other, _without(other, outcome))


def _without(job: Job, needed: Outcome) -> Outcome:
    """The outcome of a job that needs a run which was not made."""
    if needed.status == "failed":
        return job.fail(f"needs {needed.name}, which failed")
    return Outcome(job.run_spec.name, "waiting")
