"""Suites made in this process, and what two ways to the same suite must agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from backdoorbench_moe.bench.running.run import Report, run_suite
from backdoorbench_moe.bench.running.worker import Job, Outcome, work
from backdoorbench_moe.bench.suites.suite import Suite
from backdoorbench_moe.bench.tables.results import ResultSet

SIGNS = {
    "title": "Signs",
    "version": 1,
    "base": {
        "recipe": "quick",
        "dataset": {"name": "signs", "train_images": 256, "test_images": 64},
        "model": {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4},
        "train": {"epochs": 3},
        "precision": "fp32",
    },
    "grid": {"applicator": "image", "trigger": "square", "poison.rate": [0.1, 0.2]},
}


class Inline:
    """An engine without processes. alive: asked by its runs whether to go on."""

    workers = 1

    def __init__(self, alive: Callable[[], bool] = lambda: True) -> None:
        self.alive, self.jobs = alive, []

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        self.jobs += jobs
        return (work(job, self.alive) for job in jobs)


def numbers(suite: Suite, output: Path) -> dict[str, object]:
    """What must be the same between two ways to the same suite."""
    results = ResultSet.from_runs(suite, output)
    return {
        record.digest: (record.metrics, [{**row, "seconds": 0} for row in record.history])
        for record in results.finished()
    }


def run(suite: Suite, output: Path, **options) -> tuple[Report, Inline]:
    engine = options.pop("engine", None) or Inline()
    return run_suite(suite, engine, output=output, **options), engine
