"""Suites from Python: run, read, shown and saved."""

from __future__ import annotations

import csv
import io
import itertools
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from suites import BASE, GRID
from tiny import Tiny

import backdoorbench_moe as bbmoe
from backdoorbench_moe import data
from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.errors import ConfigError, RecordError, UnknownNameError

SUITE = {
    "title": "Tiny",
    "base": {**BASE, "train": {"epochs": 1, "batch_size": 32}},
    "grid": {**GRID, "poison.rate": [0.25]},
    "tables": [{"title": "T", "rows": ["trigger.name"], "columns": "metric", "metrics": ["ba", "asr"]}],
}


class Heard(bbmoe.Observer):
    """Remembers messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The result of a suite of two cells, its run folders, and what was said."""
    folder, heard = tmp_path_factory.mktemp("suite") / "runs", Heard()
    data.registry.register("tiny")(Tiny)
    try:
        return bbmoe.run_suite(SUITE, output=folder, observer=heard), folder, heard.lines
    finally:
        data.registry.unregister("tiny")


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    """Runners of other tests may hold data of the same name."""
    monkeypatch.setattr(worker, "_runners", {})


@pytest.mark.slow
def test_a_suite_is_run_once(made) -> None:
    result, folder, lines = made
    assert [line.partition(":")[0] for line in lines] == ["finished"] * 3
    assert not result.missing and not result.failed
    heard = Heard()
    again = bbmoe.run_suite(SUITE, output=folder, observer=heard)
    assert heard.lines == [] and again.table() == result.table()
    more = bbmoe.read_suite(SUITE, output=folder, repeats=2)
    assert len(more.missing) == 3 and all("-s1-" in name for name in more.missing)


@pytest.mark.slow
def test_rows_and_tables_have_the_numbers_of_the_runs(made) -> None:
    result, folder, _ = made
    rows = {row["trigger"]: row for row in result.rows()}
    assert rows.keys() == {"square", "blend", "none"}
    for path in folder.iterdir():
        run = bbmoe.load_run(path)
        row = rows["none" if run.spec.trigger is None else run.spec.trigger.name]
        found = {name: metric["value"] for name, metric in run.record.metrics.items()}
        assert (row["ba"], row["asr"], row["seed"]) == (found["ba"], found.get("asr"), 0)
        assert row["asr_n"] is None or row["asr_low"] <= row["asr"] <= row["asr_high"]
    assert rows["none"]["asr"] is None
    assert f"| {rows['square']['ba']:.1f} (n 1" in result.table() == result._repr_markdown_()
    assert "[" in result.table(intervals=True) and r"\begin{tabular}" in result.table("latex")
    cells = list(csv.DictReader(io.StringIO(result.table("csv"))))
    means = {
        cell["trigger"].partition(",")[0]: float(cell["mean"]) for cell in cells if cell["metric"] == "ba"
    }
    assert means == pytest.approx({name: rows[name]["ba"] for name in ("square", "blend")})
    assert result.table("html").startswith("<!doctype html>")
    with pytest.raises(UnknownNameError, match="form: unknown 'markdwon'; did you mean 'markdown'"):
        result.table("markdwon")


@pytest.mark.slow
def test_a_results_folder_gives_the_same(made, tmp_path) -> None:
    result, _, _ = made
    result.save(tmp_path / "saved")
    saved = bbmoe.read_suite(SUITE, results=tmp_path / "saved")
    assert saved.table() == result.table() and saved.rows() == result.rows()
    part = bbmoe.read_suite(SUITE, results=tmp_path / "saved", only="trigger=blend")
    with pytest.raises(ConfigError, match="only: cannot be saved, as a results folder contains the complete"):
        part.save(tmp_path / "part")
    assert "square" not in part.table() and {row["trigger"] for row in part.rows()} == {"blend", "none"}
    with pytest.raises(RecordError, match="expected suite 'smoke', found 'suite'"):
        bbmoe.read_suite("smoke", results=tmp_path / "saved")


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_stops_no_other(made, tmp_path, monkeypatch) -> None:
    def fail(self, images):
        raise ValueError("no blend today")

    monkeypatch.setattr("backdoorbench_moe.triggers.blend.Blend.stamp_training", fail, raising=False)
    monkeypatch.setattr("backdoorbench_moe.bench.running.run.check", lambda *_: None)
    result = bbmoe.run_suite(SUITE, output=tmp_path / "runs")
    [(name, error)] = result.failed.items()
    assert "blend" in name and result.missing == [name] and error
    assert "failed" in result.table() and len(result.rows()) == 2


@pytest.mark.slow
def test_without_time_nothing_is_run(made, tmp_path) -> None:
    result = bbmoe.run_suite(SUITE, output=tmp_path / "runs", budget=0)
    assert len(result.missing) == 3 and result.rows() == [] and "missing" in result.table()


def test_a_dict_may_have_tuples_ranges_and_numbers_of_numpy(tmp_path) -> None:
    grid = {"trigger": "square", "trigger.size": range(2, 4), "poison.rate": (np.float64(0.25), 0.5)}
    suite = MappingProxyType({**SUITE, "grid": {**grid, "applicator": "image"}})
    (tmp_path / "runs").mkdir()
    assert len(bbmoe.read_suite(suite, output=tmp_path / "runs").results.suite.cells) == 4


@pytest.mark.slow
def test_data_that_changed_between_two_calls_are_read_again(tmp_path) -> None:
    folder = tmp_path / "images"
    for part, name, brightness in itertools.product(("train", "test"), ("a", "b"), range(20)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        image = np.full((32, 32, 3), brightness + 100 * (name == "b"), np.uint8)
        Image.fromarray(image).save(folder / part / name / f"{brightness}.png")
    data_set = {"name": "folder", "root": str(folder), "image_size": 32}
    suite = {
        "title": "Folder",
        "base": {**SUITE["base"], "dataset": data_set, "train": {"epochs": 1, "batch_size": 8}},
        "grid": {"trigger": "square", "applicator": "image", "poison.rate": [0.25]},
    }
    bbmoe.run_suite(suite, output=tmp_path / "runs")
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(folder / "train" / "a" / "0.png")
    with pytest.raises(RecordError, match="were made from different folder data"):
        bbmoe.run_suite(suite, output=tmp_path / "runs", repeats=2)
    assert not worker._runners


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": {"title": "t"}}, "suite suite: grid: expected it to be given"),
        ({"suite": 3}, "suite: expected the name or path of a suite, or a dict, got an object of type int"),
        ({"suite": "smok"}, "suite: unknown 'smok'; did you mean 'smoke'"),
        ({"suite": "smoke", "repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"suite": "smoke", "only": ["trigger"]}, "--only: expected"),
        ({"suite": "smoke", "workers": 0}, "--workers: expected an integer from 1 to 1024, got 0"),
        ({"suite": "smoke", "workers": "2"}, "workers: expected an integer, got '2'"),
        ({"suite": "smoke", "repeats": "2"}, "repeats: expected an integer, got '2'"),
        ({"suite": "smoke", "threads": 1}, "threads: expected workers with it"),
        ({"suite": "smoke", "budget": "9"}, "--budget: expected a time such as 90s"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:30],
)
def test_what_is_wrong_is_named_before_anything_is_written(tmp_path, given, message) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        bbmoe.run_suite(**given, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
