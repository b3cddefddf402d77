"""How a worker ends a run that it was told to stop."""

from __future__ import annotations

import pytest
from suites import tiny_suite

from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.worker import Job, stop_working, work
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.records import RunFolder


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_SIGNS", 0.0)


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
