"""The target rate without the trigger stands beside ASR wherever runs have it."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from fake_runs import fill, finished, part_suite, write
from rich.console import Console

from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.compare import Side, default_metrics
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tidy import tidy_csv
from backdoorbench_moe.cli.tables import runs as tables
from backdoorbench_moe.cli.tables.show_columns import ShownRun, choose_columns
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.ops.metrics import proportion

LAYOUT = {"title": "t", "rows": ["applicator.name", "poison.rate"], "columns": "trigger.name"}


def record_of(spec, asr: int = 4500, rate: int = 90):
    record = finished(spec, asr=asr)
    record.metrics["target_rate"] = asdict(proportion(rate, 9000))
    record.metrics["twin_asr"] = asdict(proportion(100, 9000))
    record.metrics["twin_target_rate"] = asdict(proportion(80, 9000))
    return record


def results_of(tmp_path, **changes) -> ResultSet:
    suite = part_suite(**changes)
    for spec in suite.cells[0].runs(suite.repeats):
        write(tmp_path, record_of(spec, rate=90 + 9 * spec.seed))
    return ResultSet.from_runs(suite, tmp_path)


def metrics_of(results) -> list[str | None]:
    return [table.metric for table in build_sheet(results).tables]


def test_it_follows_asr_in_layouts_and_in_the_default_one(tmp_path) -> None:
    assert metrics_of(results_of(tmp_path)) == ["asr", "target_rate", "cad"]
    assert metrics_of(results_of(tmp_path, tables=[])) == ["asr", "target_rate", "ba", "cad"]
    text = render.markdown(build_sheet(results_of(tmp_path)))
    assert "## CIFAR-10: target rate without the trigger, %" in text
    # 90 and 99 of 9,000; the paper has no such number.
    assert "| image | 0.5% | 1.1 ± 0.1 (n 2) | missing |" in text


def test_a_layout_can_leave_it_out_and_name_it_itself(tmp_path) -> None:
    assert metrics_of(results_of(tmp_path, tables=[{**LAYOUT, "no_trigger": False}])) == ["asr"]
    named = {**LAYOUT, "metrics": ["target_rate", "asr", "twin_asr", "twin_target_rate", "twin_ba"]}
    assert metrics_of(results_of(tmp_path, tables=[named])) == named["metrics"]


def test_side_by_side_it_is_the_next_column(tmp_path) -> None:
    layout = {**LAYOUT, "rows": ["applicator.name", "poison.rate", "trigger.name"], "columns": "metric"}
    [table] = build_sheet(results_of(tmp_path, tables=[{**layout, "metrics": ["asr", "ba"]}])).tables
    assert table.columns == ("ASR", "no trigger", "BA")
    assert [place.statistic.mean for place in table.places[0]] == pytest.approx([50, 1.05, 80])


def test_older_records_have_no_empty_table(tmp_path) -> None:
    suite = part_suite()
    fill(suite, tmp_path)
    assert metrics_of(ResultSet.from_runs(suite, tmp_path)) == ["asr", "cad"]


def test_of_old_and_new_records_the_old_are_not_measured(tmp_path) -> None:
    suite = part_suite()
    fill(suite, tmp_path)
    for spec in suite.cells[0].runs(2):
        write(tmp_path, record_of(spec))
    table = build_sheet(ResultSet.from_runs(suite, tmp_path)).tables[1]
    assert table.metric == "target_rate"
    assert [place.state for place in table.places[0]] == ["finished", "not measured"]


def test_after_a_stage_it_is_the_stages(tmp_path) -> None:
    suite = part_suite(repeats=1, tables=[{**LAYOUT, "metrics": ["pruned.asr"]}])
    record = record_of(suite.cells[0].spec)
    metrics = {"asr": asdict(proportion(900, 9000)), "target_rate": asdict(proportion(45, 9000))}
    record.stages = [{"name": "pruned", "metrics": metrics, "seconds": 1.0}]
    write(tmp_path, record)
    results = ResultSet.from_runs(suite, tmp_path)
    assert metrics_of(results) == ["pruned.asr", "pruned.target_rate"]
    assert results.statistic(suite.cells[0], "pruned.target_rate").mean == 0.5
    [row] = csv.DictReader(io.StringIO(tidy_csv(results)))
    assert (row["pruned_target_rate"], row["target_rate"], row["twin_asr_n"]) == ("0.5", "1.0", "9000")


def test_csv_has_its_column_with_and_without_it(tmp_path) -> None:
    for folder, has in ((tmp_path / "new", True), (tmp_path / "old", False)):
        suite = part_suite()
        write(folder, record_of(suite.cells[0].spec) if has else finished(suite.cells[0].spec))
        [row] = csv.DictReader(io.StringIO(tidy_csv(ResultSet.from_runs(suite, folder))))
        assert row["target_rate"] == ("1.0" if has else "")


def test_comparisons_have_it_where_a_side_has_it(tmp_path) -> None:
    side = Side("a", results_of(tmp_path))
    assert default_metrics(side, side) == ("asr", "target_rate", "cad")


def test_open_metrics_in_layouts(tmp_path) -> None:
    """A task's accuracy, and its drop against the same task's accuracy in the twin."""
    layout = {**LAYOUT, "metrics": ["task/2.ba", "task/2.cad"]}
    suite = part_suite(tables=[layout], paper=None, repeats=3)
    for spec in suite.cells[0].runs(3):
        for each, hits in ((spec, 400 - spec.seed), (clean_twin(spec), 450)):
            record = finished(each)
            record.metrics["task/2.ba"] = asdict(proportion(hits, 500))
            write(tmp_path, record)
    results = ResultSet.from_runs(suite, tmp_path)
    accuracy, drop = (results.statistic(suite.cells[0], key) for key in layout["metrics"])
    assert (accuracy.mean, drop.mean) == pytest.approx((79.8, 10.2))
    assert accuracy.low < 79.8 < accuracy.high and drop.low < 10.2 < drop.high
    assert "clean accuracy (BA) of task/2, %" in render.markdown(build_sheet(results))
    assert "task_2_ba_low" in tidy_csv(results).splitlines()[0]


def test_the_tables_of_runs_have_it_or_a_dash(tmp_path) -> None:
    suite = part_suite(repeats=3)
    specs = suite.cells[0].runs(3)
    new, old = [record_of(spec) for spec in specs], [finished(spec) for spec in specs]
    for records, texts in (
        (new, ["50.00 [49.0, 51.0]", "1.00 [0.8, 1.2]"]),
        (old, ["50.00 [49.0, 51.0]", "–"]),
    ):
        shown = [ShownRun(SimpleNamespace(path=tmp_path), record, "finished") for record in records]
        columns = choose_columns(None, shown, intervals=True)
        place = [column.title for column in columns].index("ASR %")
        assert columns[place + 1].title == "no trigger %"
        assert [column.text(shown[0]) for column in columns[place : place + 2]] == texts
    for records, value in ((new, "1.00"), (old, "–")):
        single = row_of(tables.metrics_table(records[0]))
        assert single[0] == value
        runs = [SimpleNamespace(spec=r.run_spec, record=r) for r in records]
        mean, _, *seeds = row_of(tables.repeats_table(runs))
        assert (mean.partition(" ")[0], seeds) == (value, [value] * 3)


def row_of(table) -> list[str]:
    """The cells of the row of the target rate, without its name."""
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    [line] = [line for line in lines if "target rate without" in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_the_summary_has_intervals_from_three_runs(tmp_path) -> None:
    suite = part_suite(repeats=3)
    counts = zip(suite.cells[0].runs(3), (4500, 4590, 4680), strict=True)
    records = [finished(spec, ba=8000, asr=asr) for spec, asr in counts]
    for record in records:
        record.metrics["cad"] = {"value": 1.5, "n": 10000}
    runs = [SimpleNamespace(spec=record.run_spec, record=record) for record in records]
    summary = tables.summarise(runs)
    assert list(summary) == ["ba", "asr", "cad"]
    # As in tests/ops/test_intervals.py.
    assert (summary["asr"]["low"], summary["asr"]["high"]) == pytest.approx((48.31, 53.68), abs=0.01)
    assert summary["cad"]["low"] < 1.5 < summary["cad"]["high"]
    assert {summary[key]["low"] for key in summary} & {None} == set()
    two = tables.summarise(runs[:2])
    assert {two[key]["low"] for key in two} == {None}


def test_the_summary_of_runs_and_the_table_of_a_suite_have_the_same_intervals(tmp_path) -> None:
    suite = part_suite(repeats=3)
    specs = suite.cells[0].runs(3)
    for spec, ba, asr in zip(specs, (8000, 8050, 7990), (4500, 4590, 4680), strict=True):
        twin = finished(clean_twin(spec), ba=8200 + 10 * spec.seed)
        record = finished(spec, ba=ba, asr=asr)
        drop = twin.metrics["ba"]["value"] - record.metrics["ba"]["value"]
        record.metrics["cad"] = {"value": drop, "n": 10000}
        write(tmp_path, record)
        write(tmp_path, twin)
    results = ResultSet.from_runs(suite, tmp_path)
    runs = [SimpleNamespace(spec=spec, record=results.records[spec.digest]) for spec in specs]
    summary = tables.summarise(runs)
    for metric in ("ba", "asr", "cad"):
        statistic = results.statistic(suite.cells[0], metric)
        row = summary[metric]
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(
            (statistic.mean, statistic.low, statistic.high)
        )
