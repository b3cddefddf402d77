"""Models near chance: found in records new and old, marked in every table, said in one line."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_runs import fill, finished, part_suite, write
from rich.console import Console

from backdoorbench_moe.bench.pages.page import page
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.compare import Side, compare
from backdoorbench_moe.bench.tables.compare_render import comparison_markdown
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.plots import describe, draw
from backdoorbench_moe.bench.tables.record_metrics import is_of_collapsed_model
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tidy import tidy_csv
from backdoorbench_moe.cli.tables import runs as tables
from backdoorbench_moe.cli.tables.show import markdown_table
from backdoorbench_moe.cli.tables.show_columns import ShownRun, choose_columns
from backdoorbench_moe.collapse import MARK, MARK_LEGEND, collapse_line, collapsed
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.ops.metrics import proportion

TEN = [str(n) for n in range(10)]


def record_of(spec, ba: int, asr: int = 9000, classes=TEN):
    record = finished(spec, ba=ba, asr=asr)
    record.data["classes"] = classes
    return record


@pytest.fixture
def suite():
    return part_suite(repeats=3)


def drawn(item) -> str:
    console = Console(width=100, file=io.StringIO(), highlight=False)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_the_docs_printed(suite) -> None:
    """BA 10.00, ASR 100.00, CAD 0.00: a model that always answers the target."""
    record = record_of(suite.cells[0].spec, ba=1000)
    assert collapsed(record)
    line = collapse_line(record)
    assert line is not None and "\n" not in line
    assert line.startswith("near chance (BA 10.00%, chance 10.00%)") and "its ASR says nothing" in line
    good = record_of(suite.cells[0].spec, ba=6600)
    assert (collapsed(good), collapse_line(good)) == (False, None)


def test_of_a_run_without_a_trigger_no_asr_is_mentioned(suite) -> None:
    record = record_of(suite.cells[0].spec, ba=1000)
    del record.metrics["asr"]
    line = collapse_line(record)
    assert (
        line is not None
        and "ASR" not in line
        and "or its images were prepared differently in training" in line
    )


def test_the_records_own_field_decides_where_it_has_one(suite) -> None:
    record = record_of(suite.cells[0].spec, ba=1000)
    for said in (True, False):
        copy = SimpleNamespace(metrics=record.metrics, data=record.data, near_chance=said)
        assert collapsed(copy) is said
    copy = SimpleNamespace(metrics=record.metrics, data=record.data, near_chance=None)
    assert collapsed(copy)


def test_the_measured_rate_of_the_most_frequent_class_comes_before_one_in_so_many(suite) -> None:
    """15% of 10 classes is near chance; where one class has 40% of the images, so is 40%."""
    record = record_of(suite.cells[0].spec, ba=4000)
    assert not collapsed(record)
    record.data["chance"] = 40.0
    assert collapsed(record)
    assert "chance 40.00%" in (collapse_line(record) or "")


def test_without_ba_or_classes_nothing_is_claimed(suite) -> None:
    record = record_of(suite.cells[0].spec, ba=1000, classes=[])
    assert not collapsed(record)
    record = record_of(suite.cells[0].spec, ba=1000)
    record.metrics = {"task/2.ba": asdict(proportion(1000, 10000))}
    assert not collapsed(record)


def test_behind_an_input_filter_the_model_alone_decides(suite) -> None:
    """A filter that rejects nearly everything has a BA near 0; its model may be a good one."""
    record = record_of(suite.cells[0].spec, ba=9000)
    filtered = {
        **record.metrics,
        "ba": asdict(proportion(100, 10000)),
        "fpr": asdict(proportion(9900, 10000)),
    }
    record.near_chance = None
    record.stages = [
        {"name": "before", "metrics": record.metrics, "seconds": 0.0},
        {"name": "filtered", "metrics": filtered, "seconds": 1.0},
    ]
    record.metrics = filtered
    assert not collapsed(record)
    assert not is_of_collapsed_model(record, "filtered.asr")
    record.stages[0]["metrics"] = {"ba": asdict(proportion(1000, 10000))}
    assert collapsed(record)
    assert is_of_collapsed_model(record, "filtered.asr") and is_of_collapsed_model(record, "asr")
    assert "BA 10.00%" in (collapse_line(record) or "")


@pytest.fixture
def one_of_three(suite, tmp_path) -> ResultSet:
    """Seed 1 of the first cell collapsed; its twin and all other runs did not."""
    for number, cell in enumerate(suite.cells[:2]):
        for spec in cell.runs(3):
            bad = number == 0 and spec.seed == 1
            write(tmp_path, record_of(spec, ba=1000 if bad else 8000, asr=9000 if bad else 4500))
            write(tmp_path, record_of(clean_twin(spec), ba=8100))
    return ResultSet.from_runs(suite, tmp_path)


def test_a_mean_of_which_one_seed_collapsed_says_so(one_of_three) -> None:
    results, cells = one_of_three, one_of_three.suite.cells
    for metric in ("asr", "ba", "cad"):
        assert [results.statistic(cell, metric).near_chance for cell in cells[:2]] == [1, 0]
    sheet = build_sheet(results)
    assert [table.has_collapsed for table in sheet.tables] == [True, True]
    said = f"66.7 ± 28.9 (n 3, {MARK}1)"
    for text in (render.markdown(sheet), drawn(render.rich_tables(results)), page(results)):
        assert text.count(said) == 1
        assert f"{MARK}k: in k of the n seeds, the clean accuracy of the model is near chance" in " ".join(
            text.split()
        )
    assert r"66.7 $\pm$ 28.9 (n 3, $\dagger$1)" in render.latex(sheet)
    assert "50.0 ± 0.0 (n 3)" in render.markdown(sheet)
    assert f"{MARK}: the clean accuracy of at least one seed is near chance" in describe(
        results, results.suite.plots[0]
    )
    assert MARK in draw(results, results.suite.plots[0], "svg").decode()
    marked = [line for line in tidy_csv(results).splitlines() if ",yes," in line]
    assert len(marked) == 1
    [asr] = [line for line in render.statistics_csv(results).splitlines() if ",asr,finished,66.6" in line]
    assert asr.endswith(",0 1 2,1")


def test_a_comparison_says_so_too(one_of_three, tmp_path) -> None:
    other = part_suite(
        "other", repeats=3, base={"recipe": "paper", "dataset": "cifar10", "train": {"epochs": 3}}
    )
    fill(other, tmp_path / "b")
    sides = Side("a", one_of_three), Side("b", ResultSet.from_runs(other, tmp_path / "b"))
    text = comparison_markdown(compare(*sides, ["asr"]))
    assert f"66.7 ± 28.9 (n 3, {MARK}1)" in text and "near chance" in text


def test_nothing_is_marked_where_nothing_collapsed(suite, tmp_path) -> None:
    fill(suite, tmp_path)
    results = ResultSet.from_runs(suite, tmp_path)
    sheet = build_sheet(results)
    texts = [render.markdown(sheet), drawn(render.rich_tables(results)), page(results), tidy_csv(results)]
    texts += [
        describe(results, results.suite.plots[0]),
        draw(results, results.suite.plots[0], "svg").decode(),
    ]
    assert not any(MARK in text or "near chance" in text or ",yes," in text for text in texts)


def test_a_collapsed_twin_marks_the_drop_only(suite, tmp_path) -> None:
    for spec in suite.cells[0].runs(3):
        write(tmp_path, record_of(spec, ba=8000, asr=4500))
        write(tmp_path, record_of(clean_twin(spec), ba=1000 if spec.seed == 2 else 8100))
    results = ResultSet.from_runs(suite, tmp_path)
    found = {key: results.statistic(suite.cells[0], key).near_chance for key in ("asr", "ba", "cad")}
    assert found == {"asr": 0, "ba": 0, "cad": 1}


def test_a_stage_is_judged_by_its_own_accuracy(suite, tmp_path) -> None:
    """Pruned to chance, then tuned again."""
    record = record_of(suite.cells[0].spec, ba=8000)
    bad = {"ba": asdict(proportion(1000, 10000)), "asr": asdict(proportion(9000, 9000))}
    record.stages = [
        {"name": "pruned", "metrics": bad, "seconds": 1.0},
        {"name": "tuned", "metrics": record.metrics, "seconds": 1.0},
    ]
    write(tmp_path, record)
    results = ResultSet.from_runs(suite, tmp_path)
    cell = suite.cells[0]
    assert results.statistic(cell, "pruned.asr").near_chance == 1
    assert results.statistic(cell, "tuned.asr").near_chance == results.statistic(cell, "asr").near_chance == 0
    text = " ".join(drawn(tables.stages_table(record)).split())
    assert f"pruned {MARK}" in text and f"tuned {MARK}" not in text and MARK_LEGEND in text


def runs_of(suite, accuracies):
    return [
        SimpleNamespace(spec=spec, record=record_of(spec, ba=ba, asr=4500 + spec.seed))
        for spec, ba in zip(suite.cells[0].runs(len(accuracies)), accuracies, strict=True)
    ]


def test_the_tables_of_runs_are_marked(suite) -> None:
    bad, good = (run.record for run in runs_of(suite, [1000, 8000]))
    text = drawn(tables.metrics_table(bad))
    assert f"10.00 {MARK}" in text and "near chance (BA 10.00%, chance 10.00%)" in text
    assert MARK not in drawn(tables.metrics_table(good))
    shown = [ShownRun(SimpleNamespace(path=Path("run")), record, "finished") for record in (bad, good)]
    chosen = choose_columns(["seed", "ba", "asr"], shown, intervals=True)
    columns = {column.key: column for column in chosen}
    assert [columns[key].text(shown[0]).endswith(MARK) for key in ("ba", "asr", "seed")] == [
        True,
        True,
        False,
    ]
    assert not any(column.text(shown[1]).endswith(MARK) for column in columns.values())
    assert markdown_table(chosen, shown).endswith(f"|\n\n{MARK_LEGEND}")
    assert MARK not in markdown_table(chosen, shown[1:])


def test_several_seeds_say_how_many(suite) -> None:
    text = " ".join(drawn(tables.repeats_table(runs_of(suite, [8000, 1000, 8100]))).split())
    assert f"{MARK} 1 of 3 seeds near chance" in text
    assert f"seed 1 {MARK}" in text and f"seed 0 {MARK}" not in text
    assert MARK not in drawn(tables.repeats_table(runs_of(suite, [8000, 8000])))
