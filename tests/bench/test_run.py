"""Making a suite's runs: twice, stopped, failing."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fake_runs import finished, write
from making import Inline, numbers, run
from suites import GRID, tiny_suite

from backdoorbench_moe import triggers
from backdoorbench_moe.bench.running import estimate, worker
from backdoorbench_moe.bench.running.engines import local, make_engine
from backdoorbench_moe.bench.running.engines.local import LocalEngine
from backdoorbench_moe.bench.running.life_sign import LIFE_SIGN
from backdoorbench_moe.bench.running.plan import read_plan
from backdoorbench_moe.bench.running.run import Report
from backdoorbench_moe.bench.running.run import estimate as estimate_runs
from backdoorbench_moe.bench.running.worker import Job, Outcome, work
from backdoorbench_moe.bench.suites.suite import order
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.durations import parse_budget
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import Runner
from backdoorbench_moe.errors import BbmoeError, ConfigError, RecordError, UnknownNameError
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.square import Square


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_SIGNS", 0.0)


@pytest.mark.slow
def test_a_suite_is_made_once(tmp_path) -> None:
    suite = tiny_suite()
    report, engine = run(suite, tmp_path)
    assert (report.total, report.found, report.count("finished")) == (5, 0, 5)
    assert report.is_complete and not report.failed
    first = numbers(suite, tmp_path)
    assert len(first) == 5
    for cell in suite.cells:
        record = load_run(tmp_path / cell.spec.name).record
        twin = load_run(tmp_path / clean_twin(cell.spec).name).record
        assert record.metrics["cad"]["value"] == twin.metrics["ba"]["value"] - record.metrics["ba"]["value"]
        assert not (tmp_path / cell.spec.name / LIFE_SIGN).exists()
    report, engine = run(suite, tmp_path)
    assert (report.found, report.outcomes, engine.jobs) == (5, [], [])
    assert numbers(suite, tmp_path) == first


def test_finished_runs_of_edited_code_are_refused_before_anything_is_trained(tmp_path, monkeypatch) -> None:
    """Otherwise, a cell would be the mean of seeds with the old code and of seeds with the new one."""

    class Mark(Square):
        pass

    monkeypatch.setitem(triggers.registry._local, "mark", Mark)
    suite = tiny_suite(grid={**GRID, "trigger": ["mark", "square"]})
    specs = [cell.spec for cell in suite.cells]
    for spec in specs:
        write(tmp_path, finished(spec, sources={"trigger mark": "0" * 16}))
    marked = sum(spec.trigger.name == "mark" for spec in specs)
    changed = (
        rf"the code of trigger mark has changed since .* \({marked} of {len(specs)} finished runs changed\)"
    )
    with pytest.raises(RecordError, match=changed):
        run(suite, tmp_path)
    # A record in a results folder stays what it is.
    left = run(suite, tmp_path, known={spec.digest for spec in specs}, budget=1e-9)[0]
    assert left.found == len(specs)


@pytest.mark.slow
def test_runs_that_are_finished_elsewhere_are_not_made_again(tmp_path) -> None:
    suite = tiny_suite()
    first = suite.cells[0].spec
    report, engine = run(suite, tmp_path, known={first.digest})
    assert (report.total, report.found, report.is_complete) == (5, 1, True)
    assert first.digest not in {job.run_spec.digest for job in engine.jobs}
    assert not (tmp_path / first.name).exists()
    assert read_plan([first], tmp_path, {first.digest})[0].status == "finished"


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path) -> None:
    suite = tiny_suite(grid={**GRID, "trigger": ["square", {"name": "square", "size": 64}]})
    with pytest.raises(
        BbmoeError, match=r"suite tiny: tiny-pmoe-square-image-0.25-s0.*64.*to fit into the canvas"
    ):
        run(suite, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_data_set_is_said_before_anything_is_trained(tmp_path) -> None:
    suite = tiny_suite(
        base={"recipe": "paper", "dataset": {"name": "cifar10", "root": str(tmp_path / "none")}}
    )
    with pytest.raises(BbmoeError, match=r"suite tiny: .*none"):
        run(suite, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_is_said_before_anything_is_trained(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"--output .*file: "):
        run(tiny_suite(), tmp_path / "file")
    with pytest.raises(RecordError, match=r"--output .*none: expected a folder of run folders"):
        ResultSet.from_runs(tiny_suite(), tmp_path / "none")


@pytest.mark.slow
def test_a_failing_run_stops_no_other_and_is_tried_again(tmp_path, monkeypatch) -> None:
    suite = tiny_suite()
    bad = suite.cells[1].spec.name
    finish = Runner.finish

    def fail_once(self, spec, **options):
        if spec.name == bad:
            raise ZeroDivisionError("a plug-in's own error")
        return finish(self, spec, **options)

    monkeypatch.setattr(Runner, "finish", fail_once)
    report, _ = run(suite, tmp_path)
    [failed] = report.failed
    assert (failed.name, failed.error) == (bad, "ZeroDivisionError: a plug-in's own error")
    assert report.count("finished") == 4 and not report.is_complete
    record = RunFolder(tmp_path / bad).read()
    assert (record.status, record.error) == ("failed", failed.error)
    results = ResultSet.from_runs(suite, tmp_path)
    assert results.statistic(suite.cells[1], "asr") is None
    assert results.state(suite.cells[1]) == "failed"
    monkeypatch.setattr(Runner, "finish", finish)
    report, _ = run(suite, tmp_path)
    assert report.is_complete and report.count("finished") == 1


@pytest.mark.slow
def test_stopped_within_a_run_it_goes_on_to_the_same_numbers(tmp_path) -> None:
    suite = tiny_suite()
    run(suite, tmp_path / "whole")
    asked = 0

    def alive() -> bool:
        nonlocal asked
        asked += 1
        return asked < 7  # 3 batches an epoch and one question each: the second epoch of the first run.

    report, _ = run(suite, tmp_path / "cut", engine=Inline(alive))
    assert {outcome.status for outcome in report.outcomes} == {"interrupted"}
    first = next(iter(order(suite)))
    record = RunFolder(tmp_path / "cut" / first.name).read()
    assert (record.status, len(record.history)) == ("interrupted", 1)
    [planned] = read_plan([first], tmp_path / "cut")
    assert (planned.status, planned.epochs) == ("interrupted", 1)
    report, _ = run(suite, tmp_path / "cut")
    assert report.is_complete
    assert numbers(suite, tmp_path / "cut") == numbers(suite, tmp_path / "whole")


def test_a_budget_that_is_over_starts_nothing(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    late = Job(spec.to_dict(), str(tmp_path), deadline=time.time() - 1)
    [outcome] = LocalEngine().run([late])
    assert outcome == Outcome(spec.name, "waiting")
    assert not list(tmp_path.iterdir())


def test_what_ends_with_the_engine_has_not_failed(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    job, stop = Job(spec.to_dict(), str(tmp_path)), SimpleNamespace(value=True)
    assert local._lost(job, stop, "KeyboardInterrupt: ").status == "interrupted"
    assert not list(tmp_path.iterdir())
    stop.value = False
    assert local._lost(job, stop, "died").status == "failed"


@pytest.mark.slow
def test_two_calls_on_one_output_may_link_the_same_twin(tmp_path) -> None:
    suite = tiny_suite(grid={**GRID, "trigger": "square", "poison.rate": 0.25})
    run(suite, tmp_path)
    folder = RunFolder(tmp_path / suite.cells[0].spec.name)
    record = folder.read()
    cad = record.metrics.pop("cad")
    folder.write(record)
    with ThreadPoolExecutor(1) as other:
        with folder.lock():
            report = other.submit(run, suite, tmp_path)
            time.sleep(0.2)
            assert not report.done()
        assert report.result()[0].is_complete
    assert folder.read().metrics["cad"] == cad


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tables": [{"title": "t", "rows": ["seed"], "columns": "trigger"}]}, "are in the same place"),
        ({"plots": [{"title": "t", "x": "seed"}]}, "seed: expected positive numbers, for a log axis, got 0"),
        ({"paper": "badpatches_table_9"}, "unknown 'badpatches_table_9'; did you mean 'badpatches_table_3'"),
        ({"paper": {"file": "badpatches_tables_1_2", "table": 12}}, "expected a row with .*12"),
        ({"paper": {"file": "badpatches_tables_1_2", "where": {"modl.name": "pmoe"}}}, "unknown 'modl.name'"),
    ],
)
def test_what_could_not_be_drawn_is_said_before_anything_is_trained(tmp_path, values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_suite(**values), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_epoch_that_would_be_cut_is_not_started(tmp_path, monkeypatch) -> None:
    [spec, *_] = order(tiny_suite())
    watch = worker._Watch(RunFolder(tmp_path), time.time() + 100, lambda: True)
    monkeypatch.setattr(watch, "_tell", lambda: None)
    watch.on_train_start(spec.name, epochs=3, done=0, images=96)
    watch.on_epoch(1, {"seconds": 50.0})
    watch.on_epoch(3, {"seconds": 150.0})  # The last: nothing is left to cut.
    with pytest.raises(worker.StopRun):
        watch.on_epoch(1, {"seconds": 150.0})


def test_a_run_that_only_waited_takes_no_other_sign_away(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    sign = tmp_path / spec.name / LIFE_SIGN
    with RunFolder(tmp_path / spec.name).lock():
        sign.write_text("{}")
        asked = iter([True, True, False])
        outcome = work(Job(spec.to_dict(), str(tmp_path)), lambda: next(asked))
    assert (outcome.status, sign.exists()) == ("interrupted", True)


def test_a_defended_run_alone_makes_what_it_defends(tmp_path) -> None:
    grid = {**GRID, "trigger": "square", "poison.rate": 0.25, "defenses": [["fine-tuning"]]}
    _, parent, defended = order(tiny_suite(grid=grid))
    outcome = work(Job(defended.to_dict(), str(tmp_path)))
    assert outcome == Outcome(defended.name, "finished")
    assert {run.status for run in read_plan([parent, defended], tmp_path)} == {"finished"}
    assert not list(tmp_path.glob(f"*/{LIFE_SIGN}"))


def test_a_full_disk_is_the_outcome_of_a_run(tmp_path, monkeypatch) -> None:
    [spec, *_] = order(tiny_suite())

    def refuse(self, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "lock", refuse)
    outcome = work(Job(spec.to_dict(), str(tmp_path)))
    assert outcome.status == "failed" and "No space left" in (outcome.error or "")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("9m", 540), ("1h30m", 5400), ("0.5h", 1800), ("2d", 172800)]
)
def test_budgets(text, seconds) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "9 minutes", "-3m", "0s", "1.2.3s", "nans", "1e400s"])
def test_what_is_no_budget(text) -> None:
    with pytest.raises(ConfigError, match="--budget: expected a time such as 90s"):
        parse_budget(text)


def test_engines_by_name() -> None:
    with pytest.raises(UnknownNameError, match="--engine: unknown 'lokal'; did you mean 'local'"):
        make_engine("lokal")
    with pytest.raises(ConfigError, match="--workers: expected an integer from 1 to 1024, got -1"):
        make_engine("local", workers=-1)


@pytest.mark.slow
def test_an_estimate_counts_what_is_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    suite = tiny_suite()
    run(suite.only(["trigger=square"]), tmp_path)
    twin, a, b, c, d = (seconds for _, seconds in estimate_runs(read_plan(list(order(suite)), tmp_path)))
    assert (twin, a, b) == (0, 0, 0)
    assert c == d > 0


def test_a_defended_run_is_counted_by_its_defense(tmp_path) -> None:
    grid = {**GRID, "trigger": "square", "poison.rate": 0.25}
    tuned = [{"name": "fine-tuning", "epochs": 3, "clean_fraction": 0.5}]
    suite = tiny_suite(grid={**grid, "defenses": [[], ["fine-pruning"], tuned]})
    planned = [(run.total_epochs, run.share) for run in read_plan(suite.runs(), tmp_path)]
    assert planned == [(2, 1.0), (5, 0.05), (3, 0.5)]  # The victim's; fine-pruning's defaults; as given.


def test_a_model_that_is_trained_again_is_counted_with_the_whole_training_set(tmp_path) -> None:
    again = {"name": "scan", "clean_fraction": 0.5, "epochs": 3}
    without = {"name": "spectral", "epsilon": 0.2, "retrain": False}
    defenses = [["scan"], [again], [without], ["abl"], [{"name": "abl", "epochs": 4, "isolation_epochs": 1}]]
    grid = {**GRID, "trigger": "square", "poison.rate": 0.25, "defenses": defenses}
    planned = [(run.total_epochs, run.passes) for run in read_plan(tiny_suite(grid=grid).runs(), tmp_path)]
    assert planned == [(2, 2), (3, 3), (0, 0), (3, 3), (5, 5)]  # The victim has 2 epochs.


def test_a_finished_run_has_all_epochs_here_and_elsewhere(tmp_path) -> None:
    """Of a defended run those of its last defense, not those that its victim was trained for."""
    grid = {**GRID, "trigger": "square", "poison.rate": 0.25}
    tuned = [{"name": "fine-tuning", "epochs": 3, "clean_fraction": 0.5}]
    specs = tiny_suite(grid={**grid, "defenses": [[], tuned, ["strip"]]}).runs()
    for spec in specs:
        write(tmp_path, finished(spec))
    for runs in (read_plan(specs, tmp_path), read_plan(specs, tmp_path / "none", {s.digest for s in specs})):
        assert [(run.status, run.epochs, run.total_epochs) for run in runs] == [
            ("finished", 2, 2),
            ("finished", 3, 3),
            ("finished", 0, 0),
        ]


def test_a_run_is_running_while_its_folder_is_held(tmp_path) -> None:
    """Whatever its sign of life says: a killed process leaves a fresh one, `bbmoe attack` none."""
    [spec, *_] = order(tiny_suite())
    record = Record.for_spec(spec)
    record.history = finished(spec).history[:1]
    write(tmp_path, record)
    folder = RunFolder(tmp_path / spec.name)
    sign = {"start": 1, "epoch": 1, "seen": 24, "images": 96, "images_per_second": 50.0}
    fresh, old = (json.dumps({**sign, "time": time.time() - age}) for age in (0, 100))
    for text, running in ((None, (1, 0)), (old, (1, 0)), (fresh, (1.25, 50.0))):
        if text is not None:
            (folder.path / LIFE_SIGN).write_text(text)
        with folder.lock():
            [run] = read_plan([spec], tmp_path)
        assert (run.status, run.epochs, run.images_per_second) == ("running", *running)
        [run] = read_plan([spec], tmp_path)
        assert (run.status, run.epochs, run.images_per_second) == ("interrupted", 1, 0)


@pytest.mark.slow
def test_one_cell_recomputed_by_hand(tmp_path) -> None:
    suite = tiny_suite(repeats=3)
    run(suite, tmp_path)
    cell = suite.cells[2]
    values = []
    for seed in range(3):
        [file] = tmp_path.glob(f"tiny-pmoe-blend-image-0.25-s{seed}-*/record.json")
        metric = json.loads(file.read_text())["metrics"]["asr"]
        values.append(metric["value"])
    mean = sum(values) / 3
    std = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    # Student's t with two degrees of freedom and the normal distribution, both at 97.5%.
    t, z = 4.302652729911275, 1.959963984540054
    images = metric["n"]
    variance = (t / z) ** 2 * std**2 / 3 + mean * (100 - mean) / images
    n = mean * (100 - mean) / variance
    centre = (mean + 50 * z**2 / n) / (1 + z**2 / n)
    half = z * (mean * (100 - mean) / n + (50 * z / n) ** 2) ** 0.5 / (1 + z**2 / n)
    found = ResultSet.from_runs(suite, tmp_path).statistic(cell, "asr")
    assert found is not None
    assert (found.seeds, found.values, found.n) == ((0, 1, 2), tuple(values), 3)
    assert (found.mean, found.std, found.low, found.high) == pytest.approx(
        (mean, std, centre - half, centre + half)
    )


class Watching(Observer):
    """Notes what it is told of finished runs."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_found(self, folder: str) -> None:
        self.found.append(folder)


@pytest.mark.slow
def test_a_run_that_another_process_makes_meanwhile_is_not_counted_as_made(tmp_path) -> None:
    """Both wait for the same twin and the same run; each says whether it made it itself."""
    suite = tiny_suite(grid={**GRID, "trigger": "square", "poison.rate": 0.25})
    twin, spec = order(suite)
    folder = RunFolder(tmp_path / spec.name)
    with ThreadPoolExecutor(1) as other, folder.lock():
        late = other.submit(work, Job(spec.to_dict(), str(tmp_path)))
        time.sleep(0.3)
        assert not late.done()
        # What a process that holds the folder does, without its lock.
        elsewhere = Runner(spec, tmp_path / "elsewhere").finish(spec)
        folder.write(elsewhere.record)
    assert late.result() == Outcome(spec.name, "found")
    assert work(Job(twin.to_dict(), str(tmp_path))) == Outcome(twin.name, "finished")
    assert work(Job(twin.to_dict(), str(tmp_path))) == Outcome(twin.name, "found")
    report = Report(total=3, found=1, outcomes=[Outcome("a", "finished"), Outcome("b", "found")])
    assert report.is_complete and report.count("finished") == 1


def test_a_parent_that_is_found_does_not_make_the_run_a_found_one(tmp_path) -> None:
    grid = {**GRID, "trigger": "square", "poison.rate": 0.25, "defenses": [["fine-tuning"]]}
    _, parent, defended = order(tiny_suite(grid=grid))
    watching = Watching()
    Runner(parent, tmp_path, watching).finish(parent)
    assert watching.found == []
    assert work(Job(defended.to_dict(), str(tmp_path))) == Outcome(defended.name, "finished")
    Runner(parent, tmp_path, watching).finish(parent)
    assert watching.found == [str(tmp_path / parent.name)]


def test_a_run_that_is_held_is_not_waited_for_while_there_is_other_work(tmp_path) -> None:
    [spec, *_] = order(tiny_suite())
    job = Job(spec.to_dict(), str(tmp_path), wait=False)
    with job.folder.lock():
        assert work(job) == Outcome(spec.name, "held")
    assert work(job) == Outcome(spec.name, "finished")
