"""The Ray engine, on a real cluster of two nodes of this machine."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mixture_suites import BASE as MIXTURE_BASE
from mixture_suites import POISONED, mixture_suite
from PIL import Image
from tiny import TINY_MODEL
from torch.testing import assert_close

from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.engines import make_engine, ray_flight
from backdoorbench_moe.bench.running.engines.ray import RayEngine
from backdoorbench_moe.bench.running.worker import Job, Outcome, work
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.config import build_spec
from backdoorbench_moe.records import CHECKPOINT, LOCK, RunFolder

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'backdoorbench-moe[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# A lost node is noticed within five seconds, not fifteen.
IMPATIENT = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
FOR_EVER = 100_000


# One cluster for all of them: the same process under xdist (--dist loadgroup).
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU; the driver is on the first."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    head = {**node, "no_monitor": True, "include_log_monitor": False, "_system_config": IMPATIENT}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of images, which any process can read: red, green and blue ones, with noise."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 32), ("test", 16)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture
def make_jobs(images) -> Callable[..., list[Job]]:
    """(output, epochs, count, deadline) to so many runs that differ in their seeds."""

    def make(output: Path, epochs: int, count: int = 2, deadline: float | None = None) -> list[Job]:
        spec = {
            "recipe": "paper",
            "dataset": {"name": "folder", "root": str(images)},
            "model": TINY_MODEL,
            "trigger": "square",
            "applicator": "image",
            "precision": "fp32",
            "poison": {"rate": 0.25},
            "train": {"epochs": epochs, "batch_size": 32},
        }
        specs = [build_spec(spec, {"seed": seed}) for seed in range(count)]
        return [Job(spec.to_dict(), str(output), deadline) for spec in specs]

    return make


def numbers(jobs: list[Job]) -> list[object]:
    """What must be the same wherever a run is made."""
    records = [job.folder.read() for job in jobs]
    assert {record.status for record in records} == {"finished"}
    return [(r.metrics, [{**row, "seconds": 0} for row in r.history], r.seeds, r.data) for r in records]


def made_here(jobs: list[Job], output: Path) -> list[object]:
    """The numbers of the same runs, made in this process, in another folder."""
    jobs = [replace(job, output=str(output)) for job in jobs]
    assert {work(job).status for job in jobs} == {"finished"}
    return numbers(jobs)


def maker(folder: RunFolder) -> int:
    """The process that last worked in a run folder; 0 for none."""
    file = folder.path / ".lock"
    words = file.read_text().split() if file.exists() else []
    return int(words[1]) if len(words) == 2 else 0


def parent(pid: int) -> int:
    """The process that started one; 0 for one that is no more."""
    if not Path(f"/proc/{pid}/stat").exists():
        return 0
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def has_checkpoint(job: Job) -> bool:
    return (job.folder.path / CHECKPOINT / "state.safetensors").exists()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.time() + 300
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})


@pytest.mark.slow
def test_runs_on_two_nodes_are_as_here(cluster, make_jobs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = make_engine("ray", address=cluster.address)
    jobs = make_jobs(Path("runs"), 2, 4)
    outcomes, raylets = [], set()
    for outcome in engine.run(jobs):
        outcomes.append(outcome)
        raylets |= {parent(maker(job.folder)) for job in jobs} - {0}
    assert raylets == {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    assert sorted((outcome.name, outcome.status, outcome.error) for outcome in outcomes) == sorted(
        (job.run_spec.name, "finished", None) for job in jobs
    )
    assert numbers(jobs) == made_here(jobs, tmp_path / "here")
    assert {job.folder.read().environment["threads"] for job in jobs} == {1}
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(job.run_spec.name for job in jobs)


@pytest.mark.slow
def test_files_come_home_where_the_folder_is_not_shared(cluster, make_jobs, tmp_path, monkeypatch) -> None:
    # Without its token, the output folder is one that the tasks take for another machine's.
    tokens: list[str] = []
    monkeypatch.setattr(ray_flight, "write_token", lambda output, token: tokens.append(token))
    jobs = make_jobs(tmp_path / "runs", 2)
    outcomes = list(RayEngine(address=cluster.address).run(jobs))
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    assert numbers(jobs) == made_here(jobs, tmp_path / "here")
    for job in jobs:
        assert maker(job.folder) == os.getpid()
        assert sorted(path.name for path in job.folder.path.iterdir()) == [
            ".lock",
            "model.safetensors",
            "poison.npz",
            "record.json",
        ]
        here = RunFolder(tmp_path / "here" / job.run_spec.name)
        tensors, header = job.folder.load_tensors()
        assert header == here.load_tensors()[1]
        assert_close(tensors, here.load_tensors()[0], rtol=0, atol=0)
        assert (job.folder.load_poison() == here.load_poison()).all()
    [token] = tokens
    assert not list(Path(tempfile.gettempdir()).glob(f"*{token}*"))


@pytest.mark.slow
def test_where_the_folder_is_not_shared_the_runs_that_are_needed_are_sent(
    cluster, images, tmp_path, monkeypatch
) -> None:
    """A mixture on two nodes: its base, made here, and its experts, made there, are not trained again."""
    monkeypatch.setattr(ray_flight, "write_token", lambda output, token: None)
    base = {**MIXTURE_BASE, "dataset": {"name": "folder", "root": str(images)}}
    suite = mixture_suite(base=base, grid={"attack": "moevil", **POISONED}, tables=[])
    first, *jobs = [Job(spec.to_dict(), str(tmp_path)) for spec in order(suite)]
    assert work(first).status == "finished"
    # The same weights in another file, which training cannot give.
    tensors, header = first.folder.load_tensors()
    first.folder.save_model(tensors, {**header, "made": "here"})
    record = first.folder.read()
    record.model_sha256 = first.folder.model_sha256
    first.folder.write(record)
    outcomes = list(RayEngine(address=cluster.address).run(jobs))
    assert sorted(outcome.name for outcome in outcomes) == sorted(job.run_spec.name for job in jobs)
    assert {(outcome.status, outcome.error) for outcome in outcomes} == {("finished", None)}
    checked = 0
    for job in jobs:
        for needed in job.folder.read().inputs:
            assert needed["sha256"] == RunFolder(tmp_path / needed["run"]).model_sha256
            checked += needed["run"] == first.run_spec.name
    assert checked == 2 + 2  # Two experts and two mixtures.


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "side_by_side"), [(1, 1), (None, 2)])
def test_time_is_up_for_what_runs_and_what_waits(
    cluster, make_jobs, tmp_path, monkeypatch, workers, side_by_side
) -> None:
    jobs = make_jobs(tmp_path, FOR_EVER, 3, deadline=time.time() + 3600)

    def clock() -> float:
        """Of the driver alone: the nodes would go on for an hour. Time enough for a third run to start."""
        newest = [(job.folder.path / LOCK).stat().st_mtime for job in jobs if has_checkpoint(job)]
        up = len(newest) == side_by_side and time.time() > max(newest) + 5
        return time.time() + (3600 if up else 0)

    def make_slow_stop() -> Any:
        class Stop:
            def __init__(self) -> None:
                self.told, self.started = False, set[str]()

            def tell(self) -> set[str]:
                self.told = True
                return self.started

            def is_told(self, key: str) -> bool:
                time.sleep(0.5)
                self.started.add(key)
                return self.told

        return ray.remote(num_cpus=0)(Stop).remote()

    # A task that waits for the answer must not lose its CPU to another meanwhile.
    monkeypatch.setattr(ray_flight, "_make_stop", make_slow_stop)
    monkeypatch.setattr(ray_flight, "time", SimpleNamespace(time=clock))
    outcomes = list(RayEngine(workers, address=cluster.address).run(jobs))
    statuses = {outcome.name: outcome.status for outcome in outcomes}
    assert sorted(statuses.values()) == ["interrupted"] * side_by_side + ["waiting"] * (3 - side_by_side)
    for job in jobs:
        status = job.folder.read().status if job.folder.exists else "waiting"
        assert status == statuses[job.run_spec.name]


@pytest.mark.slow
def test_closed_it_stops_what_runs(cluster, make_jobs, tmp_path) -> None:
    short, long = make_jobs(tmp_path, 1, 1), make_jobs(tmp_path, FOR_EVER, 2)
    with closing(RayEngine(address=cluster.address).run([*short, *long])) as outcomes:
        assert next(outcomes) == Outcome(short[0].run_spec.name, "finished")
        wait_until(lambda: all(map(has_checkpoint, long)))
    for job in long:
        assert job.folder.read().status == "interrupted"
        assert has_checkpoint(job)
    assert not list(tmp_path.glob(".ray-*"))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_worker_that_always_dies_fails_its_run(cluster, make_jobs, tmp_path, monkeypatch) -> None:
    def die(job: Job, *rest: object) -> None:
        with (Path(job.output) / "tries").open("a") as file:
            file.write("x")
        os._exit(1)

    monkeypatch.setattr(ray_flight, "make_run", die)
    monkeypatch.setattr(ray_flight, "RETRIES", 1)
    [job] = make_jobs(tmp_path, 1, 1)
    [outcome] = RayEngine(address=cluster.address).run([job])
    assert outcome.status == "failed"
    assert (outcome.error or "").startswith("its worker was lost 2 times: WorkerCrashedError")
    assert (tmp_path / "tries").read_text() == "xx"
    assert (job.folder.read().status, job.folder.read().error) == ("failed", outcome.error)


@pytest.mark.slow
def test_a_killed_nodes_run_goes_on_elsewhere(cluster, make_jobs, tmp_path) -> None:
    """The last test on the cluster, of which it leaves one node."""
    epochs = 80
    jobs = make_jobs(tmp_path / "runs", epochs)
    [node] = cluster.worker_nodes
    raylet = node.all_processes["raylet"][0].process.pid
    lost: list[tuple[Job, int, list[Any]]] = []

    def on_node() -> list[Job]:
        return [job for job in jobs if has_checkpoint(job) and parent(maker(job.folder)) == raylet]

    def kill() -> None:
        wait_until(on_node)
        [job] = on_node()
        pid = maker(job.folder)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        _, state = job.folder.load_checkpoint()  # type: ignore[misc]
        lost.append((job, pid, state["history"]))

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill)
        outcomes = list(RayEngine(2, address=cluster.address).run(jobs))
        killing.result()
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    [(job, pid, rows)] = lost
    record = job.folder.read()
    assert maker(job.folder) != pid
    assert 0 < len(rows) < epochs == len(record.history)
    # To the microsecond: these epochs were not trained again.
    assert record.history[: len(rows)] == rows
    assert numbers([job]) == made_here([job], tmp_path / "here")


@pytest.mark.slow
def test_it_leaves_the_callers_handler_of_sigterm(cluster) -> None:
    """Ray sets one of its own, which would end the process with its runs recorded as running."""
    ray.shutdown()

    def mine(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with RayEngine(1, address=cluster.address)._cluster():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
