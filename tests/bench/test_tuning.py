"""Differences to plain tuning: of what, with which control, and what stands where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_runs import finished, write
from suites import tiny_suite

from backdoorbench_moe.bench.tables.compare import Side, compare
from backdoorbench_moe.bench.tables.compare_render import comparison_markdown
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tuning import plain_tuning
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.ops.metrics import proportion

PRUNED, TUNED, FILTERED = "fine-pruning, ratio=0.2", "fine-tuning", "strip"
GRID = {
    "trigger": "square",
    "applicator": "image",
    "defenses": [[], [{"name": "fine-pruning", "ratio": 0.2}], ["fine-tuning"], ["strip"]],
}
TABLE = {
    "title": "T",
    "rows": ["defenses"],
    "columns": "metric",
    "metrics": ["ba_over_tuning", "asr_over_tuning"],
}
# Correct of 10,000 and fooled of 9,000, by defense and seed.
COUNTS = {
    "none": [(8000, 9000), (8000, 9000), (8000, 9000)],
    PRUNED: [(7500, 900), (7700, 1800), (7600, 2700)],
    TUNED: [(7900, 4500), (7800, 4500), (7700, 4500)],
    FILTERED: [(7000, 450), (7000, 450), (7000, 450)],
}


def suite(repeats: int = 3, **changes):
    return tiny_suite(grid=GRID, tables=[TABLE], repeats=repeats, **changes)


def results(output, *, without: str = "", repeats: int = 3) -> ResultSet:
    for cell, (name, counts) in zip(suite().cells, COUNTS.items(), strict=True):
        for spec, (ba, asr) in zip(cell.runs(3), counts, strict=True):
            record = finished(spec, ba=ba, asr=asr)
            if name == FILTERED:
                record.metrics["fpr"] = {"value": 5.0, "n": 2000}
            if name != without:
                write(output, record)
    return ResultSet.from_runs(suite(repeats), output)


def rows(found: ResultSet) -> dict[str, list[object]]:
    [table] = build_sheet(found).tables
    return {
        labels[0]: [place.statistic.mean if place.statistic else place.state for place in places]
        for labels, places in zip(table.rows, table.places, strict=True)
    }


def test_each_seed_is_compared_with_plain_tuning_of_the_same_seed(tmp_path) -> None:
    found = rows(results(tmp_path))
    # BA: 75 - 79, 77 - 78, 76 - 77. ASR: 10 - 50, 20 - 50, 30 - 50.
    assert found[PRUNED] == pytest.approx([-2.0, -30.0])
    assert found["none"] == found[TUNED] == found[FILTERED] == ["–", "–"]


def test_without_plain_tuning_it_says_so(tmp_path) -> None:
    found = rows(results(tmp_path, without=TUNED))
    assert found[PRUNED] == ["no plain tuning"] * 2
    assert found[FILTERED] == ["–", "–"]  # It would not help: filters are never compared with tuning.


def test_the_interval_needs_three_seeds_and_holds_the_mean(tmp_path) -> None:
    found = results(tmp_path)
    statistic = found.statistic(found.suite.cells[1], "asr_over_tuning")
    assert statistic.low < -30 < statistic.high and statistic.low > -100
    two = results(tmp_path, repeats=2)
    assert two.statistic(two.suite.cells[1], "asr_over_tuning").interval is None


def test_a_control_near_chance_is_marked(tmp_path) -> None:
    found = results(tmp_path)
    control = suite().cells[2].spec
    record = finished(control, ba=5000, asr=4500)
    record.metrics["ba"] = {**record.metrics["ba"], "value": proportion(5000, 10000).value}
    write(tmp_path, record)
    found = ResultSet.from_runs(suite(), tmp_path)
    assert found.statistic(found.suite.cells[1], "asr_over_tuning").near_chance == 1


def test_the_control_has_the_same_clean_images_and_no_other_option() -> None:
    cells = tiny_suite(
        grid={
            "trigger": "square",
            "defenses": [
                [],
                ["fine-tuning"],
                ["strip", {"name": "fine-pruning", "ratio": 0.2, "clean_fraction": 0.5}],
                [{"name": "fine-tuning", "scope": "head"}],
            ],
        }
    ).cells
    none, tuned, chained, head = (cell.spec for cell in cells)
    assert plain_tuning(none) is None and plain_tuning(tuned) is None
    control = plain_tuning(chained)
    assert [part.to_dict() for part in control.defenses] == [
        {"name": "strip"},
        {"name": "fine-tuning", "clean_fraction": 0.5},
    ]
    assert plain_tuning(head).digest == tuned.digest


@pytest.mark.parametrize(
    ("defense", "control"),
    [
        ({"name": "tile-tuning"}, {"name": "fine-tuning", "epochs": 40}),
        ({"name": "tile-tuning", "epochs": 7}, {"name": "fine-tuning", "epochs": 7}),
        ({"name": "tile-distillation"}, {"name": "fine-tuning", "epochs": 240}),
        ({"name": "neural-cleanse", "epochs": 7}, {"name": "fine-tuning", "epochs": 20}),
        ({"name": "fst", "epochs": 5}, {"name": "fine-tuning"}),
        ({"name": "i-bau"}, {"name": "fine-tuning"}),
        ({"name": "i-bau", "rounds": 9}, {"name": "fine-tuning", "epochs": 9}),
        ({"name": "expert-drop"}, {"name": "fine-tuning"}),
        ({"name": "expert-drop", "epochs": 9}, {"name": "fine-tuning", "epochs": 9}),
        ({"name": "clp"}, {"name": "fine-tuning"}),
        ({"name": "fine-tuning", "epochs": 9}, None),
        ({"name": "fine-tuning", "epochs": 9, "scope": "head"}, {"name": "fine-tuning", "epochs": 9}),
    ],
    ids=str,
)
def test_the_control_is_as_long_as_the_defense_tunes(defense, control) -> None:
    [cell] = tiny_suite(grid={"trigger": "square", "defenses": [[defense]]}).cells
    found = plain_tuning(cell.spec)
    assert (None if found is None else found.defenses[-1].to_dict()) == control


def test_a_defense_that_is_not_installed_has_the_usual_control(monkeypatch) -> None:
    [cell] = tiny_suite(grid={"trigger": "square", "defenses": [["clp"]]}).cells
    gone = replace(cell.spec, defenses=(PartSpec("gone", {"epochs": 9}),))
    assert plain_tuning(gone).defenses[-1].to_dict() == {"name": "fine-tuning"}


def test_a_difference_of_the_same_runs_to_missing_tuning_is_not_named_the_same(tmp_path) -> None:
    sides = [
        Side(name, results(tmp_path / name, without=without)) for name, without in (("a", ""), ("b", TUNED))
    ]
    text = comparison_markdown(compare(*sides, ["asr", "asr_over_tuning"]))
    rates, differences = ([part for part in text.split("## ") if PRUNED in part][n] for n in (0, 1))
    [rate], [difference] = (
        [line for line in part.splitlines() if PRUNED in line] for part in (rates, differences)
    )
    assert "| same runs | – |" in rate
    assert "| no plain tuning | – | – |" in difference
