"""A run that was interrupted or killed, and folders that are damaged or renamed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import Tiny, tiny_spec
from tiny_runs import Counting, outcome

from backdoorbench_moe import data
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import BbmoeWarning, RecordError
from backdoorbench_moe.records import RunFolder


@pytest.mark.slow
def test_interrupted_and_gone_on_is_never_stopped(tmp_path) -> None:
    spec = tiny_spec(train={"epochs": 3, "momentum": 0.9, "schedule": "one-cycle"})
    [whole] = run_attack(spec, output=tmp_path / "whole", twin=False)
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path / "cut", twin=False, observer=Counting(stop_after=2))
    cut = load_run(tmp_path / "cut" / spec.name)
    assert cut.record.status == "interrupted" and len(cut.record.history) == 2
    after = Counting()
    [resumed] = run_attack(spec, output=tmp_path / "cut", twin=False, observer=after)
    assert after.epochs == 1
    assert outcome(resumed) == outcome(whole)
    assert not (resumed.folder.path / "checkpoint").exists()


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from tiny import Tiny, tiny_spec
from backdoorbench_moe import data
from backdoorbench_moe.engine.runner import run_attack
data.registry.register("tiny")(Tiny)
run_attack(tiny_spec(train={"epochs": 400}), output=sys.argv[1], twin=False)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_anything_it_goes_on(tmp_path) -> None:
    """Kill -9 at arbitrary moments, a write among them perhaps; then finish and compare."""
    spec = tiny_spec(train={"epochs": 400})
    here = str(Path(__file__).parents[1])
    checkpoint = tmp_path / spec.name / "checkpoint" / "state.safetensors"
    for delay in (0.0, 0.3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), here])
        deadline = time.monotonic() + 300  # On a busy machine, the start alone may take a minute.
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while time.monotonic() < deadline and not (
            checkpoint.exists() and checkpoint.stat().st_mtime_ns > before
        ):
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, "it finished before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    folder = RunFolder(tmp_path / spec.name)
    assert folder.read().status == "running"
    tensors, state = folder.load_checkpoint()
    assert 0 < state["epoch"] < 400
    # The epochs before the kill equal those of a run that is never stopped.
    whole = Counting(stop_after=state["epoch"])
    with pytest.raises(KeyboardInterrupt):
        run_attack(spec, output=tmp_path / "whole", twin=False, observer=whole)
    other, _ = RunFolder(tmp_path / "whole" / spec.name).load_checkpoint()
    assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_attack(tiny_spec(), output=tmp_path, twin=False, observer=Counting(stop_after=1))
    folder = RunFolder(tmp_path / tiny_spec().name)
    tensors, state = folder.load_checkpoint()
    del tensors["model.head.bias"]
    folder.save_checkpoint(tensors, state)
    with pytest.raises(RecordError, match=r"checkpoint: weight 'head\.bias' is missing"):
        run_attack(tiny_spec(), output=tmp_path, twin=False)


@pytest.mark.parametrize(
    ("state", "extra"),
    [
        ({"epoch": 1, "step": 3}, {}),
        (None, {}),
        ({}, {"optimizer.x.step": torch.zeros(1)}),
        ({}, {"optimizer.999.momentum_buffer": torch.zeros(1)}),
        ({}, {"optimizer.0": torch.zeros(1)}),
    ],
)
def test_a_damaged_checkpoint_is_said(tmp_path, state, extra) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_attack(tiny_spec(), output=tmp_path, twin=False, observer=Counting(stop_after=1))
    folder = RunFolder(tmp_path / tiny_spec().name)
    tensors, _ = folder.load_checkpoint()
    folder.save_checkpoint({**tensors, **extra}, state)
    with pytest.raises(RecordError, match=r"checkpoint: damaged .* delete it"):
        run_attack(tiny_spec(), output=tmp_path, twin=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": "1"}, "finished epochs, found '1'"),
        ({"epoch": -1}, "finished epochs, found -1"),
        ({"epoch": 3}, "expected 1 to 2 finished epochs, found 3"),
        ({"epoch": True}, "finished epochs, found True"),
        ({"epoch": 2}, "one row of the history for each of 2 epochs"),
        ({"history": "x"}, "one row of the history"),
        ({"history": [3]}, "one row of the history"),
        ({"history": [{"epoch": 1, "loss": 1.0}]}, "one row of the history"),
        ({"history": None}, "one row of the history"),
        ({"seconds": "1"}, "positive number of seconds, found '1'"),
        ({"seconds": 0.0}, "positive number of seconds, found 0.0"),
        ({"seconds": float("nan")}, "positive number of seconds, found nan"),
    ],
    ids=str,
)
def test_a_checkpoint_with_values_that_no_training_has_is_damaged(interrupted, change, message) -> None:
    folder, tensors, state = interrupted
    folder.save_checkpoint(tensors, {**state, **change})
    with pytest.raises(RecordError, match=f"checkpoint: damaged .*{re.escape(message)}.*delete it"):
        run_attack(tiny_spec(), output=folder.path.parent, twin=False)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted after its first epoch, with its checkpoint."""
    data.registry.register("tiny")(Tiny)
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_attack(tiny_spec(), output=output, twin=False, observer=Counting(stop_after=1))
    data.registry.unregister("tiny")
    folder = RunFolder(output / tiny_spec().name)
    return folder, *folder.load_checkpoint()


class Killed(BaseException):
    """Ends a run at once, without any handling of exceptions, as SIGKILL does."""


@pytest.mark.slow
def test_what_killed_processes_leave_is_removed(tmp_path, monkeypatch) -> None:
    """One was killed while it wrote the model, the next one as soon as the run was finished."""
    spec = tiny_spec(train={"epochs": 1})

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "save_model", die)
        run_attack(spec, output=tmp_path, twin=False)
    folder = RunFolder(tmp_path / spec.name)
    (folder.path / ".model.safetensors.123.partial").write_bytes(b"half")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "drop_checkpoint", die)
        run_attack(spec, output=tmp_path, twin=False)
    assert folder.read().status == "finished" and folder.load_checkpoint() is not None
    run_attack(spec, output=tmp_path, twin=False)
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == [".lock", "model.safetensors", "poison.npz", "record.json"]


def test_the_folder_of_another_run_is_not_taken_for_this_one(tmp_path) -> None:
    """Neither a finished run nor the checkpoint of another one, in a folder that was renamed."""
    run_attack(tiny_spec(), output=tmp_path, twin=False)
    other = tiny_spec(seed=1)
    (tmp_path / tiny_spec().name).rename(tmp_path / other.name)
    for status in ("finished", "interrupted"):
        folder = RunFolder(tmp_path / other.name)
        record = folder.read()
        record.status = status
        folder.write(record)
        with pytest.raises(RecordError, match=f"digest {other.digest}, found that of {tiny_spec().digest}"):
            run_attack(other, output=tmp_path, twin=False)


@pytest.mark.slow
def test_going_on_under_other_conditions_is_said(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_attack(tiny_spec(), output=tmp_path, twin=False, observer=Counting(stop_after=1))
    folder = RunFolder(tmp_path / tiny_spec().name)
    record = folder.read()
    record.environment["threads"] += 1
    record.environment["packages"]["torch"] = "1.0"
    folder.write(record)
    with pytest.warns(BbmoeWarning, match=r"continues in another environment \(threads, torch\)"):
        run_attack(tiny_spec(), output=tmp_path, twin=False)
