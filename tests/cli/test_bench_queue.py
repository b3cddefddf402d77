"""`bbmoe bench queue`: a thin command around `bench.running.queue`."""

from __future__ import annotations

import io
import os
import sys

import pytest
import yaml
from fake_runs import PART, fill, part_suite
from making import SIGNS

from backdoorbench_moe.bench.running import estimate
from backdoorbench_moe.cli.tables.plan import PlanProgress


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A queue of one suite whose runs are all but one finished; the priority of this process stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "nice", lambda number: number)
    suite = {key: value for key, value in PART.items() if key != "plots"}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"queue": [{"suite": "part.yaml"}]}))
    fill(part_suite(), tmp_path / "runs")
    return tmp_path


def test_what_is_left_is_said_and_what_is_there_is_saved(bbmoe, place) -> None:
    words = ("bench", "queue", "queue.yaml", "--results", "results", "--threads", "1")
    code, out, err = bbmoe(*words, "--budget", "0.000001s", width=120)
    assert code == 3 and "Traceback" not in err
    [line] = [line for line in out.splitlines() if line.startswith("part, 2 seeds")]
    assert line.split()[-1] == "results/part" and (place / "results" / "part" / "records.jsonl").exists()
    total, made, failed, left = map(int, line.split()[3:7])
    assert (made, failed) == (0, 0) and 0 < left < total


def test_a_dry_run_says_what_each_entry_still_takes(bbmoe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**SIGNS, "repeats": 2}))
    parts = [{"suite": "toy.yaml", "only": ["poison.rate=10%"]}, {"suite": "toy.yaml"}]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump({"queue": parts}))
    code, out, err = bbmoe("bench", "queue", "queue.yaml", "--results", "results", "--dry-run", width=120)
    assert "timing a few batches of 1 kind of runs" in err
    assert code == 0 and not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()
    entries = [line.split() for line in out.splitlines() if line.startswith("toy, ")]
    # Two runs and their twins; the second entry has only two more runs, as it shares the others with the first.
    assert [words[-4:-2] for words in entries] == [["4", "0"], ["2", "0"]]
    assert "6 runs, 0 finished; about" in out and "measured just now" in out


def test_results_of_an_older_version_are_found_before_anything_is_run(bbmoe, place) -> None:
    words = (
        "bench",
        "queue",
        "queue.yaml",
        "--results",
        "results",
        "--threads",
        "1",
        "--budget",
        "0.000001s",
    )
    assert bbmoe(*words)[0] == 3
    suite = yaml.safe_load((place / "part.yaml").read_text())
    (place / "part.yaml").write_text(yaml.safe_dump({**suite, "version": 4}))
    for more in ([], ["--dry-run"]):
        code, _, err = bbmoe(*words, *more, width=200)
        assert code == 2 and "results/part: is of version 3 of suite part, which is now at version 4" in err


BAD = {
    "no file": (["nowhere.yaml"], "queue file nowhere.yaml: No such file or directory"),
    "budget": (["queue.yaml", "--budget", "soon"], "--budget: expected a time"),
    "results": (["queue.yaml", "--results", "part.yaml"], "--results part.yaml: expected a folder, found a file"),
    "nice": (["queue.yaml", "--nice", "20"], "Invalid value for '--nice'"),
    "workers": (["queue.yaml", "--workers", "0", "--dry-run"], "--workers: expected an integer from 1 to 1024"),
    "nothing": ([], "Missing argument 'FILE'"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line(bbmoe, place, args, message) -> None:
    code, out, err = bbmoe("bench", "queue", *args)
    assert (code, out) == (2, "") and message in " ".join(err.split()) and "Traceback" not in err


@pytest.mark.slow
def test_a_toy_of_the_queue_is_worked_off_saved_and_reported(bbmoe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "nice", lambda number: number)
    toy = {**SIGNS, "repeats": 2, "base": {**SIGNS["base"], "train": {"epochs": 1}}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy))
    entries = [
        {"suite": "toy.yaml", "repeats": 1, "only": ["poison.rate=10%"]},
        {"suite": "toy.yaml", "repeats": 1},
    ]
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump({"queue": entries}))
    words = (
        "bench",
        "queue",
        "gpu.yaml",
        "--results",
        "results",
        "--device",
        "cpu",
        "--nice",
        "0",
        "--quiet",
    )
    code, _, err = bbmoe(*words, "--threads", "1", "--budget", "10m", width=120)
    assert code == 0, err
    assert bbmoe("report", "toy.yaml", "--from", "results/toy")[0] == 0
    assert "Of 2 cells: 2 cells have fewer seeds than wanted." in (tmp_path / "toy.html").read_text()


@pytest.mark.parametrize(("quiet", "shown"), [(False, True), (True, False)])
def test_a_dry_run_draws_its_progress_on_a_terminal(monkeypatch, quiet, shown) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with PlanProgress(quiet=quiet) as progress:
        progress.on_check(3, 8)
        progress.on_time(1, 2)
    for text in ("checking cells", "3/8", "timing kinds of runs", "1/2"):
        assert (text in terminal.getvalue()) == shown
    assert "timing a few batches" not in terminal.getvalue()
