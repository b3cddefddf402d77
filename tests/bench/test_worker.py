"""How a worker ends a run that it was told to stop."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest
from suites import GRID, tiny_suite

from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.worker import Job, stop_working, work
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.records import RunFolder


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_SIGNS", 0.0)
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_LOOKS", 3600.0)


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_signal_that_comes_again_does_not_keep_the_record_from_being_written(
    tmp_path, monkeypatch, by_signal
) -> None:
    """The second signal arrives when the record is to say that the run was interrupted."""
    [spec, *_] = order(tiny_suite())
    job = Job(spec.to_dict(), str(tmp_path))
    write, asked = RunFolder.write, []

    def signalled(folder, record):
        if record.status == "interrupted":
            stop_working()
        write(folder, record)

    def alive() -> bool:
        asked.append(True)
        if len(asked) < 3:
            return True
        if by_signal:
            stop_working()
        return False

    monkeypatch.setattr(RunFolder, "write", signalled)
    assert work(job, alive).status == "interrupted"
    assert job.folder.read().status == "interrupted"


def test_a_signal_outside_of_a_run_stops_nothing(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    stop_working()
    assert work(Job(spec.to_dict(), str(tmp_path))).status == "finished"


@pytest.mark.parametrize("by", ["deadline", "engine"])
def test_a_search_without_training_steps_ends_when_it_is_told_to(tmp_path, monkeypatch, by) -> None:
    """Neural Cleanse calls no observer while it searches, which would take minutes here."""
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_LOOKS", 0.05)
    long = {"name": "neural-cleanse", "epochs": 500, "patience": 500, "clean_fraction": 1.0}
    suite = tiny_suite(grid={**GRID, "trigger": "square", "poison.rate": 0.25, "defenses": [[long]]})
    *_, attack, defended = order(suite)
    assert work(Job(attack.to_dict(), str(tmp_path))).status == "finished"
    start = time.time()
    late = {"deadline": start + 2.0} if by == "deadline" else {}
    job = Job(defended.to_dict(), str(tmp_path), **late)
    alive = (lambda: time.time() < start + 2.0) if by == "engine" else (lambda: True)
    before = signal.getsignal(signal.SIGUSR1)
    assert work(job, alive).status == "interrupted"
    assert job.folder.read().status == "interrupted"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("error", [RecordError("the disk is full"), OSError(28, "No space left on device")])
def test_a_sign_of_life_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, error) -> None:
    """But the training still ends when its time is up."""
    tried = []

    def refuse(path: Path, _: object) -> None:
        tried.append(path.name)
        raise error

    monkeypatch.setattr(worker, "write_atomically", refuse)
    left = iter([True, True, False])
    watch = worker._Watch(RunFolder(tmp_path / "run"), math.inf, lambda: next(left))
    watch.on_train_start("run", epochs=3, done=0, images=96)
    watch.on_step(32, 0.5)
    assert tried == [worker.LIFE_SIGN] * 2
    with pytest.raises(worker.StopRun):
        watch.on_step(32, 0.5)
    watch.clear()


def test_a_folder_that_cannot_be_made_for_the_sign_ends_no_training(tmp_path) -> None:
    """For example that of a run whose parent is trained first, on a disk that is full."""
    (tmp_path / "runs").write_text("a file")
    watch = worker._Watch(RunFolder(tmp_path / "runs" / "run"), None, lambda: True)
    watch.on_train_start("run", epochs=3, done=0, images=96)
    watch.on_step(32, 0.5)
    watch.clear()
    assert (tmp_path / "runs").read_text() == "a file"
