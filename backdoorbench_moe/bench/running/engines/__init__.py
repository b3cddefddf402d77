"""Engines, which distribute jobs over processes, devices and machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.ops.ranges import check_integer
from backdoorbench_moe.process.cores import MOST_THREADS, MOST_WORKERS

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Executes runs in parallel."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Execute the runs, started in the given order; yields each outcome when it is known.

        Closing the iterator interrupts the running runs; the next call continues them. If a worker process dies, only
        the run that it was executing fails.
        """
        ...


def make_engine(
    name: str = "local",
    *,
    workers: int | None = None,
    device: str | None = None,
    address: str | None = None,
    gpus_per_run: float | None = None,
    threads: int | None = None,
) -> Engine:
    """Create an engine by name.

    Args:
        name: "local" or "ray".
        workers: Number of parallel runs; None for one or, on GPUs and in a Ray cluster, for as many as fit.
        device: The device requested by the runs.
        address: Address of a running Ray cluster.
        gpus_per_run: Share of a GPU per run, in (0, 1], with Ray.
        threads: CPU threads per run; None for an equal share of the cores, with Ray for one.

    Raises:
        UnknownNameError: The engine does not exist.
        ConfigError: An option belongs to another engine, or a requirement of the engine is missing.
    """
    check_integer("--threads", threads, 1, MOST_THREADS)
    check_integer("--workers", workers, 1, MOST_WORKERS)
    if name == "local":
        from backdoorbench_moe.bench.running.engines.local import LocalEngine, visible_gpus

        for option, value in (("--address", address), ("--gpus-per-run", gpus_per_run)):
            if value is not None:
                raise ConfigError.expected(option, "--engine ray with it", value)
        gpus = visible_gpus() if device in (None, "auto", "cuda") else []
        return LocalEngine(workers, gpus=gpus, threads=threads)
    if name == "ray":
        from backdoorbench_moe.bench.running.engines.ray import RayEngine

        return RayEngine(
            workers,
            address=address,
            gpus_per_run=gpus_per_run,
            cpus_per_run=1 if threads is None else threads,
        )
    raise UnknownNameError("--engine", name, ENGINES)
