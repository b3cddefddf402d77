"""What the Ray engine refuses, how it shares GPUs, and which files it takes and writes; no cluster is needed."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_runs import finished, write
from tiny import tiny_spec

from backdoorbench_moe.bench.running.engines import make_engine, ray_folders, ray_task
from backdoorbench_moe.bench.running.engines.ray import _share
from backdoorbench_moe.bench.running.worker import Job
from backdoorbench_moe.errors import BbmoeError, ConfigError, RecordError
from backdoorbench_moe.records import RunFolder

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'backdoorbench-moe[ray]'")


def test_no_cluster_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        start = time.time()
        for form in (address, f"ray://{address}"):
            with pytest.raises(ConfigError, match=rf"--address: no Ray cluster at {form} .*ray start --head"):
                make_engine("ray", address=form)
        assert time.time() < start + 5


def test_no_cluster_to_be_part_of(tmp_path, monkeypatch) -> None:
    def refuse(address: str, **options: object) -> None:
        raise ConnectionError(f"Could not find any running Ray instance ({address}).\nMore lines.")

    monkeypatch.setattr(ray, "init", refuse)
    message = (
        r"no Ray cluster at auto \(Could not .* instance \(auto\)\.\); start one with `ray start --head`"
    )
    with pytest.raises(ConfigError, match=message):
        list(make_engine("ray", address="auto").run([Job(tiny_spec().to_dict(), str(tmp_path))]))


def test_options_that_cannot_be(monkeypatch) -> None:
    for options, message in (
        ({"workers": 0}, "--workers: expected an integer from 1 to 1024, got 0"),
        ({"gpus_per_run": 0.0}, r"--gpus-per-run: expected a number above 0, at most 1, got 0\.0"),
        ({"gpus_per_run": 2.0}, "--gpus-per-run: expected a number above 0"),
        ({"address": "somewhere"}, "--address: expected auto, host:port or ray://host:port, got 'somewhere'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_engine("ray", **options)
    for options, message in (
        ({"address": "auto"}, "--address: expected --engine ray with it, got 'auto'"),
        ({"gpus_per_run": 0.5}, r"--gpus-per-run: expected --engine ray with it, got 0\.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_engine("local", **options)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"--engine ray: Ray cannot be .*pip install 'backdoorbench-moe\[ray\]'"
    ):
        make_engine("ray")


@pytest.mark.parametrize(
    ("gpus", "workers", "share"),
    [(0, 4, 0), (8, None, 0.5), (2, 1, 1), (2, 2, 1), (2, 3, 0.5), (3, 8, 1 / 3)],
)
def test_the_share_of_a_gpu(gpus, workers, share) -> None:
    assert _share(gpus, workers) == share


@pytest.mark.parametrize(
    "name", ["../elsewhere", "files/../../elsewhere", "files/..", "files/", "files/a/b", "/tmp/x"]
)
def test_only_a_runs_own_files_are_written(tmp_path, name) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(BbmoeError, match=rf"a worker sent unknown files: \['{re.escape(name)}'\]"):
        ray_folders.deliver(folder, {"record.json": b"{}", name: b""})
    assert not list(tmp_path.iterdir())


def test_all_files_of_a_run_come_home_the_record_last(tmp_path) -> None:
    away, home = RunFolder(tmp_path / "away"), RunFolder(tmp_path / "home")
    sent = (
        "files/trigger.image.png",
        "poison.npz",
        "probe.npz",
        "scores.npz",
        "trigger.safetensors",
        "model.safetensors",
        "record.json",
    )
    for name in (*sent, ".lock", "checkpoint/state.safetensors"):
        (away.path / name).parent.mkdir(parents=True, exist_ok=True)
        (away.path / name).write_bytes(name.encode())
    files = ray_folders.take(away)
    assert tuple(files) == sent and not away.path.exists()
    ray_folders.deliver(home, files)
    assert {name: (home.path / name).read_bytes() for name in sent} == files


def test_the_runs_that_two_tasks_need_are_written_by_one_after_the_other(tmp_path) -> None:
    """On one node, two tasks that start together get the same runs."""
    folder = RunFolder(tmp_path / "base")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with folder.lock():
            held.set()
            release.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    with pytest.raises(RecordError, match="in use by another process"):
        ray_folders.deliver(folder, {"record.json": b"{}"})
    threading.Timer(0.2, release.set).start()
    ray_folders.deliver(folder, {"record.json": b"{}"}, wait=True)
    other.join()
    assert (folder.path / "record.json").read_bytes() == b"{}"


def test_a_finished_run_that_may_be_in_use_is_not_written_again(tmp_path) -> None:
    """Another task has delivered it while this one waited for the lock, and may now read its model."""
    spec = tiny_spec()
    write(tmp_path, finished(spec))
    folder = RunFolder(tmp_path / spec.name)
    before = (folder.path / "record.json").read_bytes()
    ray_folders.deliver(folder, {"model.safetensors": b"again", "record.json": b"{}"}, wait=True)
    assert (folder.path / "record.json").read_bytes() == before
    assert not (folder.path / "model.safetensors").exists()


def test_a_task_has_the_drivers_variables_unless_its_node_has_its_own(tmp_path, monkeypatch) -> None:
    for name, value in (("BBMOE_DATA", "/data"), ("BBMOE_CACHE", "/cache"), ("BBMOE_MEMORY", "2GB")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    home = ray_task.Home.here(tmp_path / "token")
    monkeypatch.setenv("BBMOE_DATA", "/mnt/data")
    for name in ("BBMOE_CACHE", "BBMOE_MEMORY"):
        monkeypatch.delenv(name)
    monkeypatch.chdir("/")
    home.enter()
    assert (Path.cwd(), home.token) == (tmp_path, str(tmp_path / "token"))
    assert [os.environ[name] for name in ray_task.VARIABLES] == ["/mnt/data", "/cache", "2GB"]
