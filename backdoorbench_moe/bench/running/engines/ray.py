"""Runs as tasks of a Ray cluster, either a running one or one started on this machine for the call."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from backdoorbench_moe.bench.running.engines.ray_flight import Flight, Resources
from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.errors import BbmoeError, ConfigError

OBJECT_STORE_BYTES = 128 << 20  # A local cluster shares the output folder, so almost nothing is sent.
SECONDS_TO_ANSWER = 5.0


class RayEngine:
    """Executes runs as Ray tasks. Ray schedules them; a run whose worker or node is lost is restarted on another one.

    Every node needs this package, and the data at the same path or in its own $BBMOE_DATA. Nodes that share the output
    folder work in it, and a lost run continues from its checkpoint. Other nodes work in a temporary folder and send the
    files of a finished run to the driver; on these nodes, a lost or interrupted run starts over.

    Args:
        workers: Maximum number of parallel runs; None for as many as fit into the cluster.
        address: "auto" for the cluster of this machine, "host:port" of its head, or "ray://host:port" from outside the
            cluster; None starts a cluster on this machine and stops it at the end. A program that has already joined a
            cluster stays in it.
        gpus_per_run: Share of a GPU for each run that may use one, in (0, 1]; None for 0.5, or for the share with which
            `workers` runs fit.
        cpus_per_run: CPUs and torch threads per run, from 1.

    Raises:
        ConfigError: A value is out of range, Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str | None = None,
        gpus_per_run: float | None = None,
        cpus_per_run: int = 1,
    ) -> None:
        if workers is not None and workers < 1:
            raise ConfigError.expected("--workers", "at least 1", workers)
        if gpus_per_run is not None and not 0 < gpus_per_run <= 1:
            raise ConfigError.expected("--gpus-per-run", "a number above 0, at most 1", gpus_per_run)
        if cpus_per_run < 1:
            raise ConfigError.expected("cpus_per_run", "at least 1", cpus_per_run)
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--engine ray: Ray cannot be imported ({error}); pip install 'backdoorbench-moe[ray]'"
            ) from error
        if address is not None:
            _check_address(address)
        self.workers, self.address = workers, address
        self.gpus_per_run, self.cpus_per_run = gpus_per_run, cpus_per_run

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Execute the runs; see `Engine.run`. Raises BbmoeError if the cluster cannot be joined or is lost."""
        from ray.exceptions import RayError

        try:
            with self._cluster(), contextlib.closing(Flight(jobs, self._resources(), self.workers)) as flight:
                yield from flight.outcomes()
        except RayError as error:
            raise BbmoeError(f"--engine ray: the cluster was lost: {error}".splitlines()[0]) from error

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[None]:
        """Join the cluster for the duration of the block."""
        import ray

        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self.address is None:
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        # Ray ends the process immediately on SIGTERM, but the caller may want to stop its runs first.
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                self.address or "local", **options
            )  # With None instead of "local", Ray would use $RAY_ADDRESS.
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        except (OSError, RuntimeError, ValueError) as error:
            raise _no_cluster(self.address or "this machine", error) from error
        try:
            yield
        finally:
            ray.shutdown()

    def _resources(self) -> Resources:
        """Return the resources of a run. Raises ConfigError if no node of the cluster has enough."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = ([node.get(kind, 0) for node in nodes] for kind in ("CPU", "GPU"))
        if max(cpus, default=0) < self.cpus_per_run:
            raise ConfigError.expected(
                "--address", f"a cluster with {self.cpus_per_run} CPUs on a node", cpus
            )
        if self.gpus_per_run is not None and not any(gpus):
            raise ConfigError.expected("--gpus-per-run", "a cluster with GPUs", self.gpus_per_run)
        share = self.gpus_per_run or _share(sum(gpus), self.workers)
        # A process keeps the GPU that it used first, but on a node with several, Ray may assign another one to the next
        # run.
        return Resources(self.cpus_per_run, share, reuse_process=max(gpus) <= 1)


def _share(gpus: float, workers: int | None) -> float:
    """Return the share of a GPU for each of `workers` runs; 0 without GPUs."""
    if not gpus:
        return 0.0
    return 0.5 if workers is None else 1 / math.ceil(workers / gpus)


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing listens at an address, as Ray would retry for minutes and then end the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError.expected("--address", "auto, host:port or ray://host:port", address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"--address: no Ray cluster at {address} ({reason}); start one with `ray start --head`, "
        "or omit --address to start one on this machine"
    )
