"""Processes side by side: killed, refused, measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import any_file, forked
from making import SIGNS, numbers, run
from suites import tiny_suite

from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.engines import local
from backdoorbench_moe.bench.running.engines.local import LocalEngine, runs_that_fit
from backdoorbench_moe.bench.running.plan import read_plan
from backdoorbench_moe.bench.running.worker import Job, Outcome
from backdoorbench_moe.bench.suites.reading import parse_suite
from backdoorbench_moe.bench.suites.suite import order


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_SIGNS", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """The numbers of the suite, made in this process in one go."""
    suite, output = parse_suite(SIGNS, "signs"), tmp_path_factory.mktemp("whole")
    run(suite, output)
    return numbers(suite, output)


@pytest.mark.slow
def test_what_cannot_be_handed_to_a_process_fails_and_holds_up_nothing(tmp_path, monkeypatch, forks) -> None:
    first, second, *_ = order(tiny_suite())
    jobs = [Job(spec.to_dict(), str(tmp_path)) for spec in (first, second)]
    start = LocalEngine._start

    def start_once(self, number, stop):
        monkeypatch.setattr(LocalEngine, "_start", start)
        raise OSError("no more processes")

    monkeypatch.setattr(LocalEngine, "_start", start_once)
    monkeypatch.setattr(local, "work", lambda job, alive: None)  # A lambda cannot be pickled.
    outcomes = list(LocalEngine(1).run(jobs))
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert "no more processes" in outcomes[0].error and "pickle" in outcomes[1].error.lower()


@pytest.mark.slow
def test_a_run_that_cannot_be_measured_has_a_gpu_of_its_own(tmp_path, monkeypatch, forks) -> None:
    [spec, *_] = order(tiny_suite())
    engine = LocalEngine(gpus=["0"])
    monkeypatch.setattr(local, "memory_of", lambda job: None)  # A lambda cannot be pickled.
    assert engine._fit(Job(spec.to_dict(), str(tmp_path)), None) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("whole-suite")
def test_two_processes_make_what_one_makes(tmp_path, whole) -> None:
    suite = parse_suite(SIGNS, "signs")
    report, _ = run(suite, tmp_path, engine=LocalEngine(2))
    assert report.is_complete
    assert numbers(suite, tmp_path) == whole


@pytest.mark.slow
def test_a_killed_worker_fails_its_own_run_only(tmp_path, forks) -> None:
    suite = parse_suite(SIGNS, "signs")
    killed = []

    def kill_once(outcome: Outcome) -> None:
        if not killed:
            [worker] = multiprocessing.active_children()
            killed.append(worker.kill())

    report, _ = run(suite, tmp_path, engine=LocalEngine(1, threads=1), on_outcome=kill_once)
    [failed] = report.failed
    assert "worker process died" in (failed.error or "")
    assert report.count("finished") == 2
    report, _ = run(suite, tmp_path)
    assert report.is_complete and report.found == 2


@pytest.mark.slow
@pytest.mark.xdist_group("whole-suite")
def test_killed_as_a_whole_it_goes_on_to_the_same_table(tmp_path, whole) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(SIGNS))
    words = ["bench", "run", tmp_path / "mine.yaml", "--workers", "2", "--output", tmp_path]
    with forked(*words) as process:
        process.wait_until(any_file(tmp_path, "*/checkpoint/state.safetensors"))
        workers = children(process.pid)
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL and workers
    wait_until(lambda: not any(map(is_alive, workers)))
    suite = parse_suite(SIGNS, "mine")
    assert any(planned.status != "finished" for planned in read_plan(list(order(suite)), tmp_path))
    with forked(*words) as process:
        assert process.end() == 0, process.said()
    assert numbers(suite, tmp_path) == whole


def children(pid: int) -> list[int]:
    """Worker processes of a process; not the helper that keeps track of shared memory."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in command:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition, at most for so long."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("needed", "free", "runs"),
    [(9 << 30, 40 << 30, 3), (9 << 30, 8 << 30, 1), (1 << 30, 140 << 30, 4)],  # 36/10; too little; the cap.
)
def test_runs_that_fit_on_a_gpu(needed, free, runs) -> None:
    assert runs_that_fit(needed, free) == runs


@pytest.mark.slow
def test_the_memory_of_a_run_is_measured_without_a_trace(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    needed, free = worker.memory_of(Job(spec.to_dict(), str(tmp_path)))
    assert needed == free == 0 or torch.cuda.is_available()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("whole-suite")
def test_a_worker_that_is_asked_to_end_interrupts_its_run_only(tmp_path, whole) -> None:
    """SIGTERM to one worker: no failure; the next run gets a new process, and the call after it goes on."""
    suite = parse_suite(SIGNS, "signs")
    ended: list[int] = []

    def end_once() -> None:
        wait_until(lambda: any(tmp_path.glob("*/checkpoint/state.safetensors")))
        [pid] = children(os.getpid())
        ended.append(pid)
        os.kill(pid, signal.SIGTERM)

    with ThreadPoolExecutor(1) as beside:
        sent = beside.submit(end_once)
        report, _ = run(suite, tmp_path, engine=LocalEngine(1, threads=1))
        sent.result()
    statuses = sorted(outcome.status for outcome in report.outcomes)
    assert statuses == ["finished", "finished", "interrupted"] and ended
    interrupted = [one for one in read_plan(list(order(suite)), tmp_path) if one.status != "finished"]
    assert [one.status for one in interrupted] == ["interrupted"] and interrupted[0].epochs >= 1
    report, _ = run(suite, tmp_path)
    assert report.is_complete
    assert numbers(suite, tmp_path) == whole


@pytest.mark.slow
def test_two_calls_at_once_share_the_work_and_count_what_each_made(tmp_path, forks) -> None:
    """Of six runs and a twin each call makes some, none is made twice, and the sum is all."""
    grid = {**SIGNS["grid"], "poison.rate": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]}
    suite = parse_suite({**SIGNS, "grid": grid}, "signs")
    with ThreadPoolExecutor(2) as both:
        calls = [both.submit(run, suite, tmp_path, engine=LocalEngine(1, threads=1)) for _ in range(2)]
        reports = [call.result()[0] for call in calls]
    assert all(report.is_complete and report.total == 7 for report in reports)
    assert sum(report.count("finished") for report in reports) == 7
    assert all(report.count("finished") >= 2 for report in reports)
    for report in reports:
        assert report.count("finished") + report.count("found") + report.found == 7
