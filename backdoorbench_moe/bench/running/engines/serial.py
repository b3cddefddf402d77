"""Runs one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backdoorbench_moe.bench.running.engines.agenda import Agenda
from backdoorbench_moe.bench.running.worker import Job, Outcome, forget_runners, work


class SerialEngine:
    """Executes the runs in this process, with its threads; for notebooks and scripts."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Execute the runs; see `Engine.run`."""
        agenda = Agenda(jobs)
        # The data may have changed since an earlier call in this process, which goes on afterwards without them.
        forget_runners()
        try:
            while (job := agenda.take()) is not None:
                outcome = Outcome(job.run_spec.name, "waiting") if job.is_late else work(job)
                yield from agenda.note(job, outcome)
        finally:
            forget_runners()
