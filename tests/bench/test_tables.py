"""Layouts filled from records: labels, places, counts, and one cell worked out by hand from run folders."""

from __future__ import annotations

import io
import json
import statistics
import time
from dataclasses import replace

import pytest
from fake_runs import fill, finished, part_suite, write
from rich.console import Console
from suites import tiny_suite

from backdoorbench_moe.bench.running.life_sign import LIFE_SIGN
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.layout import build_sheet, cell_labels, count_runs, label
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.statistic import Sample
from backdoorbench_moe.bench.tables.tidy import tidy_csv
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.metrics import METRICS
from backdoorbench_moe.ops.intervals import seeds_interval
from backdoorbench_moe.records import Record, RunFolder


def place(results, metric, rows, column):
    [table] = [table for table in build_sheet(results).tables if table.metric == metric]
    return table.places[table.rows.index(rows)][table.columns.index(column)]


def test_a_cell_is_what_its_two_run_folders_hold(tmp_path) -> None:
    """Image, square, 0.5%: ASR 50 and 51%, by hand; the paper has 90.7."""
    suite = part_suite()
    first, second = suite.cells[0].runs(2)
    write(tmp_path, finished(first, ba=8000, asr=4500))
    write(tmp_path, finished(second, ba=8100, asr=4590))
    write(tmp_path, finished(clean_twin(first), ba=8150))
    write(tmp_path, finished(clean_twin(second), ba=8200))
    results = ResultSet.from_runs(suite, tmp_path)

    asr = place(results, "asr", ("image", "0.5%"), "square").statistic
    assert (asr.values, asr.seeds, asr.n) == ((50.0, 51.0), (0, 1), 2)
    assert asr.mean == 50.5
    assert asr.std == pytest.approx(0.5**0.5)
    # Two seeds: the values, and no verdict.
    assert (asr.low, asr.high) == (None, None)
    assert asr.paper == 90.7
    assert asr.difference == pytest.approx(-40.2)
    assert asr.inside is None

    cad = place(results, "cad", ("image", "0.5%"), "square").statistic
    assert cad.values == pytest.approx((1.5, 1.0))
    assert cad.paper == 1.5
    assert cad.inside is None


@pytest.mark.slow
def test_a_cell_again_from_the_files_alone(tmp_path) -> None:
    """Without any of our reading code: the JSON of the run folders against the table."""
    suite = part_suite()
    fill(suite, tmp_path)
    values: dict[tuple[str, str, float], list[float]] = {}
    for file in sorted(tmp_path.glob("*/record.json")):
        record = json.loads(file.read_text())
        spec = record["spec"]
        if spec["trigger"]:
            key = (spec["applicator"]["name"], spec["trigger"]["name"], spec["poison"]["rate"])
            values.setdefault(key, []).append(record["metrics"]["asr"]["value"])
    assert len(values) == 7
    results = ResultSet.from_runs(suite, tmp_path)
    for (applicator, trigger, rate), found in values.items():
        statistic = place(results, "asr", (applicator, f"{100 * rate:g}%"), trigger).statistic
        assert statistic.mean == pytest.approx(statistics.fmean(found))
        assert statistic.std == pytest.approx(statistics.stdev(found))


def test_what_was_not_run_says_why_and_has_no_number(tmp_path) -> None:
    suite = part_suite()
    specs = [cell.spec for cell in suite.cells]
    write(tmp_path, finished(specs[0]))
    for spec, status in zip(specs[1:4], ("failed", "running", "interrupted"), strict=True):
        record = Record.for_spec(spec)
        record.status = status
        write(tmp_path, record)
    write(tmp_path, finished(specs[4], asr=None))
    with RunFolder(tmp_path / specs[2].name).lock():  # As the process that makes it.
        results = ResultSet.from_runs(suite, tmp_path)
    asr, cad = build_sheet(results).tables
    states = {
        (row, column): place.state
        for row, places in zip(asr.rows, asr.places, strict=True)
        for column, place in zip(asr.columns, places, strict=True)
    }
    assert states == {
        (("image", "0.5%"), "square"): "finished",
        (("image", "10%"), "square"): "failed",
        (("image", "0.5%"), "warp"): "running",
        (("image", "10%"), "warp"): "interrupted",
        (("patch", "0.5%"), "square"): "not measured",
        (("patch", "10%"), "square"): "missing",
        (("patch", "0.5%"), "warp"): "missing",
        (("patch", "10%"), "warp"): "missing",
    }
    assert cad.places[0][0].state == "no clean twin"
    with_numbers = [place for table in (asr, cad) for row in table.places for place in row if place.statistic]
    assert with_numbers == [asr.places[0][0]]
    # The paper's value does not hang on whether we ran it.
    assert asr.places[0][1].paper == 8.2
    # Killed just now: its record says "running" for ever, and its sign of life is still fresh.
    for sign in (json.dumps({"time": time.time()}), json.dumps({"time": time.time() - 61}), "{"):
        (tmp_path / specs[2].name / LIFE_SIGN).write_text(sign)
        assert ResultSet.from_runs(suite, tmp_path).state(suite.cells[2]) == "interrupted"


@pytest.mark.parametrize("metric", ["cad", "twin_ba", "task/2.cad", "pruned.cad", "twin_asr"])
@pytest.mark.parametrize("with_twin", [False, True])
def test_a_metric_that_needs_the_twin_says_whether_there_is_one(tmp_path, metric, with_twin) -> None:
    """With a twin, `cad` and `twin_ba` are there, and the others were not measured."""
    layout = {"title": "t", "rows": ["applicator.name", "poison.rate"], "columns": "trigger.name"}
    suite = part_suite(tables=[{**layout, "metrics": [metric]}], paper=None)
    for spec in suite.cells[0].runs(2):
        write(tmp_path, finished(spec))
        if with_twin:
            write(tmp_path, finished(clean_twin(spec)))
    [table] = build_sheet(ResultSet.from_runs(suite, tmp_path)).tables
    found = "finished" if metric in ("cad", "twin_ba") else "not measured"
    assert table.places[0][0].state == (found if with_twin else "no clean twin")


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_have_no_interval_and_no_verdict(tmp_path, seeds) -> None:
    suite = part_suite()
    for spec in suite.cells[0].runs(seeds):
        # 90.7%, exactly the paper's value.
        write(tmp_path, finished(spec, asr=8163))
    statistic = place(ResultSet.from_runs(suite, tmp_path), "asr", ("image", "0.5%"), "square").statistic
    assert statistic.difference == pytest.approx(0)
    assert (statistic.n, statistic.low, statistic.inside) == (seeds, None, None)
    assert statistic.std == (None if seeds == 1 else 0)


# ASR 50 to 52% and BA 80%, the twin's 81.5%, over three seeds: (metric, mean, published, inside).
THREE = [
    ("asr", 51.0, 90.7, False),
    # The interval is 48.31 to 53.68.
    ("asr", 51.0, 53.6, True),
    ("asr", 51.0, 53.8, False),
    ("asr", 51.0, 48.2, False),
    ("cad", 1.5, 1.5, True),
    ("cad", 1.5, 4.0, False),
]


@pytest.mark.parametrize(("metric", "mean", "published", "inside"), THREE)
def test_three_seeds_have_an_interval_and_a_verdict(tmp_path, metric, mean, published, inside) -> None:
    suite = part_suite(repeats=3)
    cell = suite.cells[0]
    for spec, asr in zip(cell.runs(3), (4500, 4590, 4680), strict=True):
        write(tmp_path, finished(spec, ba=8000, asr=asr))
        write(tmp_path, finished(clean_twin(spec), ba=8150))
    results = ResultSet.from_runs(suite, tmp_path)
    [row] = [row for row in results.paper.rows if row["asr"] == "90.7" and row["trigger"] == "square"]
    paper = replace(results.paper, rows=({**row, metric: str(published)},))
    found = replace(results, paper=paper).statistic(cell, metric)
    assert found.mean == pytest.approx(mean)
    assert found.low < found.mean < found.high
    assert found.inside is inside


def test_a_published_value_is_known_to_half_its_last_digit(tmp_path) -> None:
    """All of 9,000 images in three seeds: 99.957 to 100%. "99.9" may have been 99.94, but not 99.96."""
    suite = part_suite(repeats=3)
    cell = suite.cells[0]
    for spec in cell.runs(3):
        write(tmp_path, finished(spec, asr=9000))
    results = ResultSet.from_runs(suite, tmp_path)
    [row] = [row for row in results.paper.rows if row["asr"] == "90.7" and row["trigger"] == "square"]
    inside = {}
    for text in ("100.0", "100", "99.9", "99.90", "99.96", "99"):
        paper = replace(results.paper, rows=({**row, "asr": text},))
        inside[text] = replace(results, paper=paper).statistic(cell, "asr").inside
    # 99.9 ± 0.05 ends at 99.95.
    assert inside == {
        "100.0": True, "100": True, "99.9": False, "99.90": False, "99.96": True, "99": False
    }  # fmt: skip


def test_a_ratio_that_may_exceed_100_percent_has_no_interval_of_a_share() -> None:
    sample = Sample((99.0, 100.0, 100.0), 9000)
    assert sample.interval(METRICS["overall"]) is None
    assert sample.interval(METRICS["asr"]) == seeds_interval(sample.values, 9000)


def test_places_the_grid_has_not_are_dashes(tmp_path) -> None:
    grid = [
        {"applicator": "image", "trigger": "square", "poison.rate": 0.1},
        {"applicator": "patch", "trigger": "warp", "poison.rate": 0.1},
    ]
    table = build_sheet(ResultSet.from_runs(part_suite(grid=grid), tmp_path)).tables[0]
    assert [[place.state for place in row] for row in table.places] == [["missing", "–"], ["–", "missing"]]
    assert table.places[0][1].cell is None


def test_two_cells_in_one_place_are_refused(tmp_path) -> None:
    grid = {"applicator": "image", "trigger": [{"name": "square", "size": n} for n in (2, 4)]}
    suite = part_suite(grid=grid)
    with pytest.raises(ConfigError, match=r"table 'CIFAR-10': .*'size': 4.* are in the same place"):
        build_sheet(ResultSet.from_runs(suite, tmp_path))


def test_counts_of_runs_and_clean_twins(tmp_path) -> None:
    suite = part_suite()
    fill(suite, tmp_path)
    record = Record.for_spec(suite.cells[-1].spec)
    record.status = "failed"
    write(tmp_path, record)
    counts = count_runs(ResultSet.from_runs(suite, tmp_path))
    # 8 cells x 2 seeds, all but the last cell's; a twin a seed.
    assert (counts.finished, counts.wanted, counts.failed) == (14, 16, 1)
    assert (counts.others_finished, counts.others_wanted, counts.others) == (2, 2, "clean twins")


def test_a_suite_without_tables_gets_one(tmp_path) -> None:
    table = build_sheet(ResultSet.from_runs(part_suite(tables=[]), tmp_path)).tables[0]
    assert (table.row_keys, table.column_key) == (("applicator", "trigger"), "poison.rate")
    assert table.rows[0] == ("image", "square")
    assert table.columns == ("0.5%", "10%")


def test_a_suite_with_one_axis_and_no_tables_is_drawn_beside_the_paper(tmp_path) -> None:
    base = {"recipe": "paper", "dataset": "cifar10", "trigger": "square", "applicator": "image"}
    suite = tiny_suite(
        base=base, grid={"poison.rate": ["0.5%", "2%"]}, paper={"file": "badpatches_tables_1_2", "table": 1}
    )
    results = ResultSet.from_runs(suite, tmp_path)
    [asr, *_] = build_sheet(results).tables
    assert (asr.rows, asr.columns) == ((("pmoe",),), ("0.5%", "2%"))
    console = Console(file=io.StringIO(), width=100)
    console.print(render.rich_tables(results))
    assert "90.7" in console.file.getvalue()


def test_groups_leave_out_labels_that_repeat_those_above(tmp_path) -> None:
    layout = {
        "title": "t",
        "rows": ["applicator.name", "trigger.name", "poison.rate"],
        "columns": "model.name",
    }
    table = build_sheet(ResultSet.from_runs(part_suite(tables=[layout]), tmp_path)).tables[0]
    assert [[labels for labels, _ in group] for group in table.groups()] == [
        [(name, "square", "0.5%"), ("", "", "10%"), ("", "warp", "0.5%"), ("", "", "10%")]
        for name in ("image", "patch")
    ]


def test_without_spread_the_interval_has_a_width_and_equal_is_inside(tmp_path) -> None:
    """99.8% of 9,000 is not 99.8 to the last bit."""
    suite = part_suite(paper={"file": "badpatches_tables_1_2", "table": 1}, repeats=3)
    cell = next(c for c in suite.cells if (c.values["applicator"], c.values["trigger"]) == ("patch", "warp"))
    [ten] = [c for c in suite.cells if c.values == {**cell.values, "poison.rate": "10%"}]
    for spec in ten.runs(3):
        write(tmp_path, finished(spec, asr=8982))
    statistic = place(ResultSet.from_runs(suite, tmp_path), "asr", ("patch", "10%"), "warp").statistic
    assert (statistic.std, statistic.paper) == (0, 99.8)
    assert statistic.low < 99.8 < statistic.high
    assert statistic.inside is True


def test_metrics_side_by_side(tmp_path) -> None:
    """One table; a filter's metrics where there is one; the seconds of a defense, of a stage, else of the training."""
    defenses = [[], [{"name": "fine-pruning", "ratio": 0.2}], ["strip"]]
    metrics = ["asr", "pruned.asr", "auroc", "fpr", "seconds", "pruned.seconds"]
    layout = {"title": "All", "rows": ["defenses"], "columns": "metric", "metrics": metrics}
    grid = {"applicator": "image", "trigger": "square", "poison.rate": "10%", "defenses": defenses}
    suite = part_suite(grid=grid, repeats=1, tables=[layout], plots=[], paper=None)
    plain, pruned, filtered = (finished(cell.spec, asr=4500 - 900 * n) for n, cell in enumerate(suite.cells))
    before = {"name": "before", "metrics": plain.metrics, "seconds": 0.0}
    pruned.timing["defense_seconds"] = filtered.timing["defense_seconds"] = 12.5
    stages = [("pruned", plain.metrics, 2.5), ("tuned", pruned.metrics, 10.0)]
    pruned.stages = [before, *({"name": n, "metrics": m, "seconds": s} for n, m, s in stages)]
    for name in ("auroc", "tpr", "fpr"):
        filtered.metrics[name] = {"value": 5.0, "n": 100, "low": 1.0, "high": 9.0}
    filtered.stages = [before, {"name": "filtered", "metrics": filtered.metrics, "seconds": 12.5}]
    for record in (plain, pruned, filtered):
        write(tmp_path, record)
    results = ResultSet.from_runs(suite, tmp_path)
    [table] = build_sheet(results).tables
    assert table.columns == ("ASR", "pruned ASR", "AUROC", "FPR", "seconds", "pruned seconds")
    assert table.rows == (("none",), ("fine-pruning, ratio=0.2",), ("strip",))
    values = [[place.statistic and place.statistic.mean for place in row] for row in table.places]
    assert values == [
        [50.0, None, None, None, 60.5, None],
        [40.0, 50.0, None, None, 12.5, 2.5],
        [30.0, None, 5.0, 5.0, 12.5, None],
    ]
    head, _, *lines = render.markdown(build_sheet(results)).splitlines()[4:]
    assert head == "## All"
    assert lines[0].startswith("| defenses | ASR | pruned ASR |")
    columns = tidy_csv(results).splitlines()[0].split(",")
    assert {"auroc", "auroc_low", "fpr_n", "filtered_tpr"} <= set(columns)
    assert not any("auroc" in name for name in tidy_csv(ResultSet(suite, {}, results.paper)).split(","))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("poison.rate", 0.005, "0.5%"),
        ("poison.noise", 0.1, "10%"),
        ("poison.cover", None, "none"),
        ("trigger.ratio", 0.1, "0.1"),
        ("poison", {"rate": 0.01, "source": [1, 2], "labels": "dirty"}, "rate=1%, source=1+2, labels=dirty"),
        ("poison", {"source": []}, "source=none"),
    ],
)
def test_labels_of_shares_of_the_training_set_are_in_percent(key, value, text) -> None:
    assert label(key, value) == text


def test_a_label_has_the_options_of_the_grid_and_those_that_tell_cells_apart() -> None:
    square, weak = {"name": "square", "size": 4}, {"name": "blend", "alpha": 0.1}
    grid = {"trigger": [square, "blend", weak], "model": ["pmoe"]}
    layout = {"title": "T", "rows": ["trigger"], "columns": "model", "metrics": ["asr"]}
    suite = tiny_suite(base={"recipe": "quick", "dataset": "signs"}, grid=grid, tables=[layout])
    assert all(cell.spec.model.options for cell in suite.cells)  # Those of the recipe.
    assert cell_labels(suite, "trigger") == ["square, size=4", "blend", "blend, alpha=0.1"]
    assert cell_labels(suite, "model") == ["pmoe"] * 3
