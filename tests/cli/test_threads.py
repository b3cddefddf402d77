"""`--threads`, and the warning where cores are busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from commands import SIGNS, forked

from backdoorbench_moe.bench.running.engines import make_engine
from backdoorbench_moe.cli.tables.plan import total_line
from backdoorbench_moe.cli.terminal import threads as module
from backdoorbench_moe.cli.terminal.threads import CoreUsage, warn_of_busy_cores
from backdoorbench_moe.errors import BbmoeWarning, ConfigError
from backdoorbench_moe.process.cores import usable_cores

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A machine of some cores, whose /proc/stat and clock are ours."""

    def __init__(self, monkeypatch, tmp_path: Path, cores: int) -> None:
        self.cores, self.folder, self.seconds, self.busy, self.own = cores, tmp_path, 0.0, [0.0] * cores, 0.0
        monkeypatch.setattr(module, "PROC", tmp_path)
        monkeypatch.setattr(module, "CGROUP", tmp_path)
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(module.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(module.time, "process_time", lambda: self.own)
        self._write()

    def _write(self) -> None:
        rows = [
            f"cpu{n} {int(busy * TICKS)} 0 0 {int((self.seconds - busy) * TICKS)} 0 0 0 0 0 0"
            for n, busy in enumerate([*self.busy, 9e3])  # One core more, which this process may not use.
        ]
        (self.folder / "stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 6"]))

    def passes(self, seconds: float, *, busy: float, own: float = 0.0) -> None:
        """Let time pass in which so many cores work for others, and this process takes `own` cores."""
        self.seconds += seconds
        self.own += own * seconds
        for place in range(self.cores):
            self.busy[place] += seconds * (busy + own) / self.cores
        self._write()


@pytest.mark.parametrize(
    ("cores", "busy", "own", "free"),
    [(2, 0, 0, 2), (2, 1, 0.9, 1), (8, 2.5, 1, 5.5), (2, 2, 0, 0), (64, 16, 1, 48)],
)
def test_free_cores_are_those_that_others_leave(monkeypatch, tmp_path, cores, busy, own, free) -> None:
    machine = Machine(monkeypatch, tmp_path, cores)
    machine.passes(100, busy=cores)  # Before the measurement: not counted.
    usage = CoreUsage.now()
    machine.passes(2, busy=busy, own=own)
    assert usage.free_cores() == pytest.approx(free, abs=cores / TICKS)


@pytest.mark.parametrize(
    ("threads", "busy", "advice"),
    [(2, 0.2, None), (2, 1.0, "--threads 1"), (1, 2.0, None), (2, 2.0, "--threads 1"), (2, 0.45, None)],
)
def test_a_warning_where_threads_would_wait(monkeypatch, tmp_path, threads, busy, advice) -> None:
    machine = Machine(monkeypatch, tmp_path, 2)
    usage = CoreUsage.now()
    machine.passes(2, busy=busy)
    if advice is None:
        warn_of_busy_cores(threads, usage)
        return
    with pytest.warns(BbmoeWarning, match=advice):
        warn_of_busy_cores(threads, usage)


@pytest.mark.parametrize(
    ("busy", "said"), [(0.2, "just now)"), (1.5, "just now while other programs used 1.5 of 2 cores)")]
)
def test_an_estimate_says_if_others_used_the_cores(monkeypatch, tmp_path, busy, said) -> None:
    machine = Machine(monkeypatch, tmp_path, 2)
    usage = CoreUsage.now()
    machine.passes(4, busy=busy, own=0.5)
    assert total_line([], usage).endswith(said)


@pytest.mark.parametrize(
    ("limit", "warned"), [("max 100000", False), ("200000 100000", True), ("nonsense", False)]
)
def test_a_containers_quota_counts(monkeypatch, tmp_path, limit, warned) -> None:
    machine = Machine(monkeypatch, tmp_path, 64)
    (tmp_path / "cpu.max").write_text(limit)
    usage = CoreUsage.now()
    machine.passes(2, busy=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_busy_cores(64, usage)
    assert bool(said) == warned
    if warned:
        assert "64 threads on 2 cores" in str(said[0].message) and "--threads 2" in str(said[0].message)


def test_a_machine_that_does_not_say_is_not_warned_of(monkeypatch, tmp_path) -> None:
    """A warning is an error in the tests."""
    machine = Machine(monkeypatch, tmp_path, 2)
    usage = CoreUsage.now()
    machine.passes(0.1, busy=2)
    warn_of_busy_cores(64, usage)  # Too short a measurement.
    (tmp_path / "stat").unlink()
    machine.seconds += 5
    warn_of_busy_cores(64, usage)
    warn_of_busy_cores(64, CoreUsage.now())


def test_this_machine_is_measured() -> None:
    """One core kept busy by another process is not free."""
    if not Path("/proc/stat").exists():
        pytest.skip("needs /proc/stat")
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        usage = CoreUsage.now()
        time.sleep(1.0)
        free = usage.free_cores()
    finally:
        busy.kill()
        busy.wait()
    assert free is not None and free < usage.cores - 0.3  # 0.3: it has to share its core, it may be.


@pytest.mark.slow
def test_the_number_is_used_and_recorded(tmp_path, bbmoe) -> None:
    more = len(usable_cores()) + 1
    for threads in (1, more):
        words = ["attack", *SIGNS, "--epochs", "1", "--no-twin", "--threads", threads, "--json", "--quiet"]
        warning, used = said_and_used(*words, "--output", tmp_path / str(threads))
        assert used == threads
        assert warning.startswith(f"bbmoe: warning: --threads {more} on ") if threads == more else not warning
    [run] = (tmp_path / "1").iterdir()
    assert said_and_used("defend", run, "--defense", "fine-tuning", "--threads", 2, "--json")[1] == 2
    assert bbmoe("attack", "--threads", 0)[0] == 2


def said_and_used(*words: object) -> tuple[str, int]:
    """What a command says before its JSON document, and the threads that the document gives."""
    with forked(*words) as process:
        assert process.end() == 0, process.said()
        said, brace, document = process.said().partition("{")
    return said, json.loads(brace + document)["runs"][0]["environment"]["threads"]


def test_an_engine_gives_its_runs_so_many() -> None:
    assert make_engine("local", workers=2, device="cpu", threads=3).threads_each == 3
    shared = len(os.sched_getaffinity(0))
    assert make_engine("local", workers=1, device="cpu").threads_each == shared
    for wrong in (0, 99999999):
        with pytest.raises(ConfigError, match=f"--threads: expected an integer from 1 to 1024, got {wrong}"):
            make_engine("local", threads=wrong)
    pytest.importorskip("ray")
    assert make_engine("ray", threads=3).cpus_per_run == 3
    assert make_engine("ray").cpus_per_run == 1


@pytest.mark.parametrize(
    "words",
    [["attack", "--dry-run"], ["bench", "run", "smoke", "--dry-run"], ["bench", "queue", "none.yaml"]],
    ids=" ".join,
)
def test_so_many_threads_that_pytorch_would_end_the_process_are_refused(bbmoe, words) -> None:
    code, _, said = bbmoe(*words, "--threads", 99999999)
    assert code == 2 and "'--threads': 99999999 is not in the range 1<=x<=1024" in said


@pytest.mark.slow
def test_workers_have_their_threads(tmp_path) -> None:
    suite = {
        "title": "Threads",
        "version": 1,
        "base": {
            "dataset": {"name": "signs", "train_images": 256, "test_images": 64},
            "model": {"name": "pmoe", "widen_factor": 1, "moe_channels": 8, "expert_channels": 4},
            "train": {"epochs": 1},
        },
        "grid": {"applicator": "image", "trigger": "square", "poison.rate": 0.1},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(suite))
    words = ["bench", "run", tmp_path / "mine.yaml", "--threads", 3, "--output", tmp_path / "runs", "--quiet"]
    with forked(*words) as process:
        assert process.end() == 0, process.said()
    found = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/record.json")]
    assert [record["environment"]["threads"] for record in found] == [3, 3]
    assert torch.get_num_threads() != 3


@pytest.mark.parametrize(("cores", "expected"), [(6, 6), (None, 1)])
def test_a_system_without_affinity_has_all_cores(monkeypatch, cores, expected) -> None:
    """As macOS: nothing asks for what is not there."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert usable_cores() == set(range(expected))
    assert make_engine("local", workers=2, device="cpu").threads_each == max(1, expected // 2)
    assert CoreUsage.now().cores <= expected
