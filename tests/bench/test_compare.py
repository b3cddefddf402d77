"""Comparisons: which cells match, and the interval of a difference by hand."""

from __future__ import annotations

import csv
import io

import pytest
from fake_runs import fill, finished, part_suite, write
from mixture_suites import BASE as MIXTURE_BASE
from mixture_suites import GRID, mixture_suite
from rich.console import Console

from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.suite import Suite, value_of
from backdoorbench_moe.bench.tables.compare import (
    Side,
    compare,
    default_metrics,
    open_side,
    read_folder,
)
from backdoorbench_moe.bench.tables.compare_render import comparison_csv, comparison_markdown, rich_comparison
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.bench.tables.tidy import tidy_csv
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.ops.intervals import paired_interval

SMALL = {"recipe": "paper", "dataset": {"name": "cifar10", "train_images": 10000}, "train": {"epochs": 10}}
BASES = {"large": {"recipe": "paper", "dataset": "cifar10"}, "small": SMALL}


def side(suite: Suite, output, name: str = "x") -> Side:
    return Side(name, ResultSet.from_runs(suite, output))


def pairs(comparison):
    return [row.labels for row in comparison.rows if row.a is not None and row.b is not None]


def test_means_and_difference_of_a_common_cell(tmp_path) -> None:
    """ASR 50, 51, 52% against 60, 61, 62% of 9,000 images: the interval of the difference by hand."""
    first, second = part_suite("first", repeats=3), part_suite("second", base=SMALL, repeats=3)
    for suite, counts in ((first, (4500, 4590, 4680)), (second, (5400, 5490, 5580))):
        for spec, asr in zip(suite.cells[0].runs(3), counts, strict=True):
            write(tmp_path, finished(spec, asr=asr))
    row = compare(side(first, tmp_path), side(second, tmp_path), ["asr"]).rows[0]
    assert row.difference("asr") == pytest.approx(10)

    def wilson(p: float) -> tuple[float, float]:
        # A standard deviation of 1 point over 3 seeds; t is 4.30265 with 2 degrees of freedom.
        variance = (4.30265 / 1.959964) ** 2 * 0.01**2 / 3 + p * (1 - p) / 9000
        n, z = p * (1 - p) / variance, 1.959964
        centre, half = p + z * z / 2 / n, z * (p * (1 - p) / n + (z / 2 / n) ** 2) ** 0.5
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)

    (a_low, a_high), (b_low, b_high) = wilson(0.51), wilson(0.61)
    low = 10 - 100 * ((0.61 - b_low) ** 2 + (a_high - 0.51) ** 2) ** 0.5
    high = 10 + 100 * ((b_high - 0.61) ** 2 + (0.51 - a_low) ** 2) ** 0.5
    assert row.interval("asr") == pytest.approx((low, high), abs=1e-3)
    # Student's t of both sides, added as squares, would be 10 ± 3.51 without the images.
    assert 3.5 < (high - low) / 2 < 4.2


@pytest.mark.parametrize("counts", [(1, 3), (3, 2), (2, 2)])
def test_with_fewer_than_three_seeds_on_a_side_there_is_no_interval(tmp_path, counts) -> None:
    first, second = part_suite("first", repeats=3), part_suite("second", base=SMALL, repeats=3)
    for suite, count in zip((first, second), counts, strict=True):
        for spec in suite.cells[0].runs(count):
            write(tmp_path, finished(spec, asr=4500 + 10 * spec.seed))
    row = compare(side(first, tmp_path), side(second, tmp_path), ["asr"]).rows[0]
    assert row.difference("asr") is not None
    assert row.interval("asr") is None


def test_saturated_sides_have_an_interval_of_some_width(tmp_path) -> None:
    """Student's and Welch's intervals of 100, 100, 100 have none."""
    first, second = part_suite("first", repeats=3), part_suite("second", base=SMALL, repeats=3)
    for suite, asr in ((first, 8991), (second, 9000)):
        for spec in suite.cells[0].runs(3):
            write(tmp_path, finished(spec, asr=asr))
    row = compare(side(first, tmp_path), side(second, tmp_path), ["asr"]).rows[0]
    low, high = row.interval("asr")
    assert row.difference("asr") == pytest.approx(0.1)
    assert low < 0.1 < high <= 100 - 99.8


def test_defenses_of_the_same_models_are_compared_seed_by_seed(tmp_path) -> None:
    """An attack that succeeds better with one seed than with another succeeds better after both defenses."""
    grid = {"applicator": ["image"], "trigger": ["square"], "defenses": [["clp"], ["fst"]]}
    suite = part_suite(grid=grid, repeats=3, paper=None, tables=[], plots=[])
    counts = {"clp": (900, 4500, 8100), "fst": (810, 4230, 7920)}
    for cell in suite.cells:
        for spec, asr in zip(cell.runs(3), counts[cell.spec.defenses[0].name], strict=True):
            write(tmp_path, finished(spec, asr=asr))
    sides = [Side(name, ResultSet.from_runs(suite.only([f"defenses={name}"]), tmp_path)) for name in counts]
    [row] = compare(*sides, ["asr"]).rows
    assert row.paired and row.difference("asr") == pytest.approx(-2)
    assert row.interval("asr") == pytest.approx(paired_interval([10, 50, 90], [9, 47, 88], 9000))
    # Models of other triggers are different models, even with the same seeds.
    first, second = part_suite(repeats=3), part_suite("second", base=SMALL, repeats=3)
    assert not any(row.paired for row in compare(side(first, tmp_path), side(second, tmp_path), ["asr"]).rows)


def test_scales_match_cell_by_cell_and_what_differs_is_said(tmp_path) -> None:
    comparison = compare(side(part_suite(), tmp_path), side(part_suite("b", base=SMALL), tmp_path), ["asr"])
    assert comparison.counts == (8, 0, 0)
    assert comparison.differs == (
        ("dataset.train_images of cifar10", "none", "10000"),
        ("train.epochs", "25", "10"),
    )
    assert comparison.keys == ("trigger.name", "applicator.name", "poison.rate")
    assert comparison.rows[0].labels == ("square", "image", "0.5%")


def test_data_sets_and_models_match_where_one_side_has_one(tmp_path) -> None:
    dense = part_suite("dense", grid={**part_suite_grid(), "model": ["vgg16_bn", "preact_resnet18"]})
    comparison = compare(side(part_suite(), tmp_path), side(dense, tmp_path), ["asr"])
    assert comparison.counts == (16, 0, 0)
    assert comparison.differs == (("model.name", "pmoe", "preact_resnet18, vgg16_bn"),)
    assert comparison.rows[0].labels == ("vgg16_bn", "square", "image", "0.5%")
    other = part_suite("gtsrb", base={"recipe": "paper", "dataset": "gtsrb"})
    assert compare(side(part_suite(), tmp_path), side(other, tmp_path), ["asr"]).counts == (8, 0, 0)


def part_suite_grid():
    return {"applicator": ["image", "patch"], "trigger": ["square", "warp"], "poison.rate": ["0.5%", "10%"]}


def test_a_model_both_have_is_matched_with_itself_only(tmp_path) -> None:
    dense = part_suite("dense", grid={**part_suite_grid(), "model": ["pmoe", "vgg16_bn"]})
    comparison = compare(side(part_suite(), tmp_path), side(dense, tmp_path), ["asr"])
    assert comparison.counts == (8, 0, 8)
    assert {labels[0] for labels in pairs(comparison)} == {"pmoe"}
    assert {row.labels[0] for row in comparison.rows if row.a is None} == {"vgg16_bn"}


def test_rates_and_options_are_never_mixed(tmp_path) -> None:
    """Rates 0.5 and 10% against 1 and 10%: only 10% is common. Likewise the sizes of the square."""
    other = part_suite("other", grid={**part_suite_grid(), "poison.rate": ["1%", "10%"]})
    comparison = compare(side(part_suite(), tmp_path), side(other, tmp_path), ["asr"])
    assert comparison.counts == (4, 4, 4)
    assert {labels[-1] for labels in pairs(comparison)} == {"10%"}
    sizes = [part_suite(grid={"trigger": [{"name": "square", "size": n} for n in ns], "applicator": "image"})
             for ns in ((1, 2), (2, 3))]  # fmt: skip
    comparison = compare(side(sizes[0], tmp_path), side(sizes[1], tmp_path), ["asr"])
    assert [row.labels for row in comparison.rows] == [("2",), ("1",), ("3",)]
    assert comparison.counts == (1, 1, 1)


def test_a_surrogate_of_some_cells_is_compared_and_has_columns(tmp_path) -> None:
    routing = {"name": "narcissus", "surrogate": "wide_resnet"}
    grid = {"applicator": "image", "trigger": ["square", routing, {**routing, "surrogate": "twin"}]}
    ours, theirs = (
        part_suite(grid=grid, base={"dataset": "cifar10", "recipe": recipe}) for recipe in ("paper", "quick")
    )
    labels = [value_of(cell.spec, "surrogate") for cell in theirs.cells]
    assert labels == [None, "wide_resnet, widen_factor=1, bn_momentum=0.1", None]
    assert [value_of(cell.spec, "surrogate.widen_factor") for cell in ours.cells] == [None, 10, None]
    fill(ours, tmp_path)
    [head, *rows] = csv.reader(io.StringIO(tidy_csv(ResultSet.from_runs(ours, tmp_path))))
    assert {row[head.index("surrogate")] for row in rows} == {"none", "wide_resnet"}
    comparison = compare(side(ours, tmp_path), side(theirs, tmp_path), ["asr"])
    assert comparison.counts == (3, 0, 0)


def test_cells_with_and_without_gates_are_compared(tmp_path) -> None:
    """A dense model, which has no gate, beside mixtures, one of whose gates has an option."""
    dense = {"trigger": "square", "applicator": "image", "poison.rate": ["1%"]}
    merged = {"attack": "moevil", "gate": [{"name": "top-k", "top_k": 1}, "soft"]}
    values = {"grid": [dense, merged], "tables": [], "plots": [], "paper": None}
    sides = [side(part_suite(name, base=base, **values), tmp_path) for name, base in BASES.items()]
    comparison = compare(*sides, ["asr"])
    assert comparison.counts == (3, 0, 0)
    assert comparison.keys == ("model.name", "gate.name")
    assert pairs(comparison) == [("pmoe", "–"), ("convnext", "top-k"), ("convnext", "soft")]


def test_the_same_runs_on_both_sides_have_no_difference(tmp_path) -> None:
    fill(part_suite(), tmp_path)
    comparison = compare(side(part_suite("a"), tmp_path), side(part_suite("b"), tmp_path), ["asr", "cad"])
    row = comparison.rows[0]
    assert (row.same, row.difference("asr"), row.interval("asr")) == (True, None, None)
    assert "| same runs |" in comparison_markdown(comparison)
    # Not run on either side is not "the same runs".
    assert comparison.rows[7].same is False


@pytest.mark.parametrize("changed", [None, "metrics", "digest"])
def test_runs_are_the_same_wherever_they_were_made(tmp_path, changed) -> None:
    """The records of two machines, which have the data in different folders; and what makes other runs of them."""
    sides = []
    for name in ("a", "b"):
        base = {"recipe": "paper", "dataset": {"name": "cifar10", "root": f"/of/{name}"}}
        suite = part_suite(name, base=base, repeats=1)
        spec = suite.cells[0].spec
        if name == "b" and changed == "digest":
            suite = part_suite(name, base={**base, "train": {"epochs": 3}}, repeats=1)
            spec = suite.cells[0].spec
        record = finished(spec, asr=4500 + (name == "b" and changed == "metrics"))
        record.timing["train_seconds"] = 10.0 + len(sides)
        write(tmp_path / name, record)
        sides.append(side(suite, tmp_path / name))
    row = compare(*sides, ["asr"]).rows[0]
    assert row.a is not None and row.b is not None
    assert (row.same, row.difference("asr") is None) == (changed is None, changed is None)


def test_cells_with_files_match_by_content_whatever_folder_they_lie_in(tmp_path) -> None:
    sides = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(b"other" if name == "c" else b"picture")
        trigger = {"name": "blend", "image": str(tmp_path / name / "p.png")}
        grid = {"applicator": "image", "trigger": [trigger, "square"], "poison.rate": ["1%", "2%"]}
        sides.append(side(part_suite(name, grid=grid), tmp_path))
    assert compare(*sides[:2], ["asr"]).counts == (4, 0, 0)
    other = compare(sides[0], sides[2], ["asr"])
    assert other.differs == () or all("files" in key for key, *_ in other.differs)
    for comparison in (compare(*sides[:2], ["asr"]), other):
        assert str(tmp_path) not in comparison_markdown(comparison) + comparison_csv(comparison)


def test_seeds_near_chance_are_counted_for_each_side(tmp_path) -> None:
    """Two of three seeds of B guess one of two classes; A has learned its task."""
    first, second = part_suite("first", repeats=3), part_suite("second", base=SMALL, repeats=3)
    for suite, counts in ((first, (8000, 8000, 8000)), (second, (5000, 8000, 5000))):
        for spec, ba in zip(suite.cells[0].runs(3), counts, strict=True):
            write(tmp_path, finished(spec, ba=ba))
    comparison = compare(side(first, tmp_path), side(second, tmp_path), ["asr"])
    row, missing, *_ = csv.DictReader(io.StringIO(comparison_csv(comparison)))
    assert (row["a_near_chance"], row["b_near_chance"]) == ("0", "2")
    assert (missing["a_state"], missing["a_near_chance"], missing["a_n"]) == ("missing", "0", "0")
    assert "†2" in comparison_markdown(comparison)


def test_nothing_in_common_is_an_error(tmp_path) -> None:
    a = part_suite("a", grid={**part_suite_grid(), "poison.rate": ["1%", "2%"]})
    b = part_suite("b", grid={**part_suite_grid(), "poison.rate": ["3%", "4%"]})
    with pytest.raises(ConfigError, match="A and B have no cell in common"):
        compare(side(a, tmp_path, "A"), side(b, tmp_path, "B"), ["asr"])


@pytest.mark.slow
def test_results_folders_stand_for_themselves_whatever_their_version(tmp_path) -> None:
    """Old results against new ones; the suite file is not asked."""
    for version, shift in ((3, 0), (4, 450)):
        suite = part_suite(version=version, plots=[])
        fill(suite, tmp_path / f"runs{version}", shift=shift)
        save_results(ResultSet.from_runs(suite, tmp_path / f"runs{version}"), tmp_path / f"v{version}")
    old, new = (open_side(str(tmp_path / name), tmp_path) for name in ("v3", "v4"))
    assert old.label.startswith("suite part, version 3 (")
    assert default_metrics(old, new) == ("asr", "ba", "cad")
    comparison = compare(old, new, ["asr", "cad"])
    assert comparison.counts == (7, 0, 0)
    # 450 of 9,000 more, in every cell that does not reach 100%.
    assert [row.difference("asr") for row in comparison.rows] == pytest.approx([5.0] * 7)
    assert comparison.rows[0].difference("cad") == pytest.approx(0)
    assert comparison.rows[0].a["cad"].statistic.n == 2


@pytest.mark.slow
def test_clean_cells_of_results_folders_are_compared(tmp_path) -> None:
    """The folders of a suite with cells without an attack, at two lengths of training; B has one cell more."""
    sides = []
    for name, epochs in (("a", 1), ("b", 2)):
        grid = {**GRID[0], "gate": ["top-k", "soft", "hidden"][: 1 + epochs]}
        suite = mixture_suite(
            base={**MIXTURE_BASE, "train": {"epochs": epochs}}, grid=[grid, GRID[1]], repeats=2
        )
        for spec in suite.nodes:
            write(tmp_path / name / "runs", finished(spec, ba=8000 + 100 * epochs))
        save_results(ResultSet.from_runs(suite, tmp_path / name / "runs"), tmp_path / name / "results")
        sides.append(open_side(str(tmp_path / name / "results"), tmp_path))
    comparison = compare(*sides, ["ba"])
    assert comparison.counts == (6, 0, 1)
    found = {row.labels: row.difference("ba") for row in comparison.rows}
    assert comparison.keys == ("attack.name", "gate.name")
    clean = {gate: difference for (attack, gate), difference in found.items() if attack == "none"}
    assert clean == {"top-k": pytest.approx(1), "soft": pytest.approx(1), "hidden": None}


@pytest.mark.parametrize(("seeds", "cell_seeds"), [((1, 2), [1, 2]), ((0, 2), [0, 1, 2])])
def test_a_results_folder_has_the_seeds_of_its_records(tmp_path, seeds, cell_seeds) -> None:
    """Two of three seeds are finished; a seed between them is missing."""
    suite = part_suite(repeats=3, plots=[])
    for spec in suite.cells[0].runs(3):
        if spec.seed in seeds:
            write(tmp_path / "runs", finished(spec, asr=4500 + 90 * spec.seed))
    save_results(ResultSet.from_runs(suite, tmp_path / "runs"), tmp_path / "results")
    results = read_folder(tmp_path / "results")
    [cell] = results.suite.cells
    assert [spec.seed for spec in cell.runs(results.suite.repeats)] == cell_seeds
    found = results.statistic(cell, "asr")
    assert found is not None and found.seeds == seeds
    assert found.values == pytest.approx([50.0 + seed for seed in seeds])


def test_twins_that_are_no_cells_are_not_compared(tmp_path) -> None:
    suite = mixture_suite(grid=GRID[1])
    for spec in suite.nodes:
        write(tmp_path / "runs", finished(spec))
    save_results(ResultSet.from_runs(suite, tmp_path / "runs"), tmp_path / "results")
    cells = read_folder(tmp_path / "results").suite.cells
    assert sorted(cell.spec.digest for cell in cells) == sorted(cell.spec.digest for cell in suite.cells)


def test_folders_that_are_none(tmp_path) -> None:
    with pytest.raises(RecordError, match=r"expected a suite\.json in it"):
        open_side(str(tmp_path), tmp_path)
    (tmp_path / "suite.json").write_text("{}")
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(RecordError, match="holds no finished run"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "suite or results folder: unknown 'nothing'; known: "),
        ("results/none", "suite or results folder: 'results/none' not found$"),
        ("results/none.yaml:small", r"suite or results folder: 'results/none\.yaml' not found$"),
    ],
)
def test_what_is_neither_a_suite_nor_a_folder(text, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        open_side(text, tmp_path)


@pytest.mark.parametrize("text", ["smoke:", ":small", "smoke:small"])
def test_suites_that_are_none(text, tmp_path) -> None:
    with pytest.raises(ConfigError):
        open_side(text, tmp_path)


def test_csv_and_terminal_say_the_same(tmp_path) -> None:
    first = part_suite("first")
    second = part_suite("second", base=SMALL, grid={**part_suite_grid(), "poison.rate": ["10%", "20%"]})
    for suite, shift in ((first, 0), (second, 900)):
        fill(suite, tmp_path, shift=shift)
    comparison = compare(side(first, tmp_path), side(second, tmp_path), ["asr"])
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert [row["cells"] for row in rows] == ["both"] * 4 + ["only A"] * 4 + ["only B"] * 4
    # A's cell 1: 1000 and 1300 of 9,000; B's cell 0: 900 and 1200.
    assert (rows[0]["poison_rate_percent"], rows[0]["difference"]) == ("10", "-1.111111")
    assert (rows[0]["a_mean"], rows[0]["b_mean"]) == ("12.777778", "11.666667")
    assert rows[4]["b_mean"] == rows[4]["difference"] == ""
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(rich_comparison(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "4 cells in both, 4 only in A, 4 only in B" in text
    at = next(n for n, line in enumerate(text.splitlines()) if line.startswith("square   image"))
    two = [line.split() for line in text.splitlines()[at : at + 2]]
    assert two[0] == ["square", "image", "10%", "12.8", "±", "2.4", "(n", "2)", "−1.1"]
    assert two[1][:5] == ["11.7", "±", "2.4", "(n", "2)"]
