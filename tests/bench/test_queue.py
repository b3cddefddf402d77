"""A queue of suites: read, worked off within a budget, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml
from fake_runs import PART, fill, finished, part_suite
from fake_runs import write as write_record
from making import SIGNS, Inline

from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.queue import Entry, read_queue, read_results, work_off
from backdoorbench_moe.bench.tables.results import read_lines
from backdoorbench_moe.config import load_yaml
from backdoorbench_moe.errors import BbmoeError


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})


class Told:
    """A watcher that keeps what it was told."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.reports = 0

    def on_check(self, done: int, total: int) -> None:
        assert done <= total

    def on_outcome(self, outcome) -> None:
        self.outcomes.append(outcome.status)

    def conclude(self, report) -> None:
        self.reports += 1


def make(entries, folder, engine=None, **options):
    """Work off a queue with runs and results in a folder: progress, watcher and engine."""
    told, engine = Told(), engine or Inline()

    @contextmanager
    def watch(suite, known) -> Iterator[Told]:
        yield told

    done = work_off(
        entries, engine, output=folder / "runs", results=folder / "results", watch=watch, **options
    )
    return list(done), told, engine


def write(folder, queue) -> object:
    (folder / "queue.yaml").write_text(yaml.safe_dump(queue))
    return folder / "queue.yaml"


@pytest.mark.slow
def test_entries_share_runs_and_are_saved(tmp_path) -> None:
    suite = tmp_path / "signs.yaml"
    suite.write_text(yaml.safe_dump({**SIGNS, "repeats": 2}))
    file = write(
        tmp_path,
        {"queue": [{"suite": str(suite), "repeats": 1, "only": ["poison.rate=0.2"]}, {"suite": str(suite)}]},
    )
    first, second = entries = read_queue(file)
    assert (first.label, second.label) == ("signs, 1 seed, poison.rate=0.2", "signs, 2 seeds")
    done, told, engine = make(entries, tmp_path)
    # One attacked run and its twin; then two rates and the twin for each of two seeds, without those two.
    assert [each.report.count("finished") for each in done] == [2, 4]
    assert [each.report.found for each in done] == [0, 2] and told.outcomes == ["finished"] * 6
    folder = tmp_path / "results" / "signs"
    assert [each.saved for each in done] == [folder, folder] and len(read_lines(folder)) == 6
    names = {job.run_spec.name for job in engine.jobs}
    assert len(names) == len(engine.jobs) == 6

    # The same call trains nothing and writes nothing; neither does one without the run folders.
    before = (folder / "records.jsonl").stat().st_mtime_ns
    for place in ("runs", "elsewhere"):
        (tmp_path / "runs").rename(tmp_path / place)
        done, told, engine = make(entries, tmp_path)
        assert engine.jobs == [] and [each.saved for each in done] == [None, None]
        assert all(each.report.is_complete for each in done)
    assert (folder / "records.jsonl").stat().st_mtime_ns == before


def test_a_budget_that_is_over_begins_nothing_but_saves_what_is_there(tmp_path) -> None:
    (tmp_path / "part.yaml").write_text(
        yaml.safe_dump({key: value for key, value in PART.items() if key != "plots"})
    )
    fill(part_suite(), tmp_path / "runs")
    [progress], told, engine = make([Entry(str(tmp_path / "part.yaml"))], tmp_path, budget=1e-9)
    assert (engine.jobs, told.outcomes, told.reports) == ([], [], 0)
    assert progress.saved == tmp_path / "results" / "part" and not progress.report.is_complete
    assert len(read_lines(progress.saved)) == progress.report.found > 0


def test_seeds_beyond_those_of_the_suite_are_saved_and_kept(tmp_path) -> None:
    """The suite has two seeds: an entry with three saves three, and a later one with one seed keeps them."""
    file = tmp_path / "part.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in PART.items() if key != "plots"}))
    fill(part_suite(), tmp_path / "runs", repeats=3)
    for repeats, seeds in ((2, {0, 1}), (3, {0, 1, 2})):
        [progress], *_ = make([Entry(str(file), repeats=repeats)], tmp_path, budget=1e-9)
        assert progress.saved == tmp_path / "results" / "part"
        assert {record.run_spec.seed for record in read_lines(progress.saved)} == seeds
    last = part_suite().cells[-1].spec
    write_record(tmp_path / "runs", finished(last))
    [progress], *_ = make([Entry(str(file), repeats=1)], tmp_path, budget=1e-9)
    kept = read_lines(progress.saved)
    assert {record.run_spec.seed for record in kept} == {0, 1, 2} and last.digest in {r.digest for r in kept}
    assert len(kept) == 7 * 3 + 3 + 1


def test_the_root_is_given_to_data_sets_that_have_one() -> None:
    entry = Entry("standard-attacks", "small", repeats=1)
    assert {cell.spec.dataset.options.get("root") for cell in entry.placed("/data", None).cells} == {"/data"}
    assert entry.placed("/data", None).digest == entry.part.digest
    signs = Entry("standard-attacks", "quick", repeats=1).placed("/data", "cpu")
    assert {(cell.spec.dataset.options.get("root"), cell.spec.device) for cell in signs.cells} == {
        (None, "cpu")
    }


@pytest.mark.slow
def test_the_queue_of_the_project_names_what_exists() -> None:
    from pathlib import Path

    folder = Path(__file__).parents[2] / "benchmarks"
    listed = load_yaml(folder / "queue.yaml")["queue"]
    for item in listed:
        if item["suite"].endswith(".yaml"):
            item["suite"] = str(folder.parent / item["suite"])
        assert Entry(**item).part.cells
    assert read_results(folder / "results")


BAD = {
    "other key": ({"runs": []}, "key: unknown 'runs'"),
    "no list": ({"queue": {}}, "queue: expected a list of at least one entry"),
    "empty": ({"queue": []}, "queue: expected a list of at least one entry"),
    "no mapping": ({"queue": ["smoke"]}, "entry 1: expected a mapping, got 'smoke'"),
    "no suite": ({"queue": [{"scale": "quick"}]}, "entry 1: suite: expected the name of a suite"),
    "unknown key": (
        {"queue": [{"suite": "smoke"}, {"suite": "smoke", "seed": 1}]},
        "entry 2: key: unknown 'seed'",
    ),
    "unknown suite": ({"queue": [{"suite": "smok"}]}, "entry 1: suite: unknown 'smok'"),
    "unknown scale": (
        {"queue": [{"suite": "standard-attacks", "scale": "smal"}]},
        "scale: unknown 'smal'; did you mean",
    ),
    "no seeds": ({"queue": [{"suite": "smoke", "repeats": 0}]}, "entry 1: repeats: expected at least 1"),
    "seeds as text": ({"queue": [{"suite": "smoke", "repeats": "two"}]}, "entry 1: repeats: expected"),
    "no cell": ({"queue": [{"suite": "smoke", "only": ["trigger=blend"]}]}, "--only trigger.name: value"),
}


@pytest.mark.parametrize(("queue", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_found_before_anything_is_run(tmp_path, queue, message) -> None:
    with pytest.raises(BbmoeError) as error:
        read_queue(write(tmp_path, queue))
    assert message in str(error.value) and "queue.yaml" in str(error.value)


def test_the_folder_of_results_is_a_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BbmoeError, match=r"--results .*file: expected a folder, found a file"):
        read_results(tmp_path / "file")
    assert read_results(tmp_path / "nowhere") == {}
