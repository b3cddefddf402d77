"""Suites of mixtures: shared nodes, going on after a stop, two workers, tables."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from making import SIGNS, Inline, numbers, run
from mixture_suites import BASE, POISONED, mixture_suite

from backdoorbench_moe.attacks.moevil import SIMILARITY
from backdoorbench_moe.bench.running import worker
from backdoorbench_moe.bench.running.engines.local import LocalEngine
from backdoorbench_moe.bench.running.plan import Planned, read_plan
from backdoorbench_moe.bench.save import save_results
from backdoorbench_moe.bench.suites.paper import load_paper
from backdoorbench_moe.bench.suites.reading import list_suites, load_suite
from backdoorbench_moe.bench.suites.suite import order, value_of
from backdoorbench_moe.bench.tables import render
from backdoorbench_moe.bench.tables.compare import Side, compare, read_folder
from backdoorbench_moe.bench.tables.layout import build_sheet, count_runs
from backdoorbench_moe.bench.tables.plots import build_panels, describe
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine.graph import NodeKind, base_of, clean_twin, expert_of, kind_of
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.errors import ConfigError, UnknownNameError

SIGNS_BASE = {**BASE, "dataset": SIGNS["base"]["dataset"]}
MOEVIL = [name for name in list_suites() if name.startswith("moevil-")]


@pytest.fixture(autouse=True)
def fresh_runners(monkeypatch) -> None:
    monkeypatch.setattr(worker, "_runners", {})
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_SIGNS", 0.0)


@pytest.fixture
def made(monkeypatch) -> Counter[str]:
    """How often the making of each run was begun in this process, by name."""
    counts: Counter[str] = Counter()
    make = Maker.make

    def counting(self, folder, inputs):
        counts[folder.path.name] += 1
        return make(self, folder, inputs)

    monkeypatch.setattr(Maker, "make", counting)
    return counts


def kinds(specs) -> Counter[NodeKind]:
    return Counter(kind_of(spec) for spec in specs)


def test_the_arms_of_a_suite_share_base_and_experts() -> None:
    suite = mixture_suite(repeats=2)
    assert kinds(order(suite)) == {
        NodeKind.TRAINED: 2,
        NodeKind.EXPERT: 2 * 2,
        NodeKind.POISONED_EXPERT: 2 * 2,  # The gates share the poisoned experts.
        NodeKind.MIXTURE: 2 * 6,  # Those without an attack are the clean twins of the others.
    }
    benign = {cell.spec.digest for cell in suite.cells if not cell.spec.attacked}
    assert {clean_twin(cell.spec).digest for cell in suite.cells} == benign


@pytest.mark.slow
def test_the_second_arm_trains_no_base_and_no_benign_expert_again(tmp_path, made) -> None:
    suite = mixture_suite()
    first = suite.only(["attack=moevil", "gate=top-k"])
    report, _ = run(first, tmp_path)
    assert report.is_complete and len(made) == 1 + 2 + 1 + 2
    made.clear()
    report, _ = run(suite, tmp_path)
    assert report.is_complete
    assert set(made.values()) == {1}
    assert base_of(suite.cells[0].spec).name not in made
    assert [name for name in made if "convnext-expert" in name] == [
        expert_of(suite.only(["attack=expert-tuning"]).cells[0].spec, 1).name
    ]
    assert len(made) == 1 + 4  # An expert of the control, and all mixtures but the first arm's and its twin.
    made.clear()
    run(suite, tmp_path)
    assert not made


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_numbers(tmp_path, made) -> None:
    suite = mixture_suite().only(["gate=top-k"])
    run(suite, tmp_path / "whole")
    whole = set(made)
    for calls in (2, 6, 12, 20, 28):
        made.clear()
        cut, asked = tmp_path / f"cut{calls}", iter(range(calls))
        report, _ = run(suite, cut, engine=Inline(lambda asked=asked: next(asked, None) is not None))
        assert not report.is_complete and not report.failed
        report, _ = run(suite, cut)
        assert report.is_complete
        assert set(made) == whole
        assert numbers(suite, cut) == numbers(suite, tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_make_what_one_makes(tmp_path, forks) -> None:
    # The workers do not know the data set "tiny".
    suite = mixture_suite(base=SIGNS_BASE, grid=[{"attack": None}, {"attack": "moevil", **POISONED}])
    report, _ = run(suite, tmp_path / "two", engine=LocalEngine(2, threads=1))
    assert report.is_complete
    assert report.count("finished") == report.total  # None was made within another job, and none twice.
    run(suite, tmp_path / "one")
    assert numbers(suite, tmp_path / "two") == numbers(suite, tmp_path / "one")


@pytest.mark.slow
def test_tables_counts_and_comparison(tmp_path) -> None:
    suite = mixture_suite(repeats=3)
    run(suite, tmp_path / "runs")
    results = ResultSet.from_runs(suite, tmp_path / "runs")
    counts = count_runs(results)
    assert (counts.wanted, counts.others, counts.others_wanted) == (18, "runs they build on", 15)
    assert count_runs(ResultSet.from_runs(suite.only(["attack=moevil"]), tmp_path / "runs")).others == (
        "clean twins and runs they build on"
    )
    [table] = build_sheet(results).tables
    assert table.columns == ("ASR", "twin ASR", "unsafe", "alone ASR", "Overall", "own share")
    by_row = dict(zip(table.rows, table.places, strict=True))
    assert list(by_row) == [
        *((gate, "none") for gate in ("top-k", "soft")),
        *((gate, name) for gate in ("top-k", "soft") for name in ("expert-tuning", "moevil")),
    ]
    benign, attacked = by_row["top-k", "none"], by_row["top-k", "moevil"]
    assert [place.state for place in benign] == [
        "not measured",
        "not measured",
        "finished",
        "not measured",
        "finished",
        "not measured",
    ]
    for place in attacked:
        assert place.statistic is not None and place.statistic.n == 3
        # `Overall` is a ratio of two accuracies, not a share of images.
        assert (place.statistic.interval is None) == (place is attacked[4])
    cell = suite.only(["attack=moevil", "gate=top-k"]).cells[0]
    expert = results.record(expert_of(cell.spec, 1))
    assert expert is not None
    assert results.value(cell.spec, "alone_asr") == expert.metrics["asr"]["value"]
    text = render.markdown(build_sheet(results))
    assert (
        "Overall: accuracy in percent of that of the task's benign expert" in text and "H in MoEvil" in text
    )
    save_results(results, tmp_path / "saved")
    header, *rows = (tmp_path / "saved" / "tidy.csv").read_text().splitlines()
    assert {"gate", "splitter_options", "poisoned_experts", "task", "task_0_ba"} <= set(header.split(","))
    assert len(rows) == 18 + 15
    # A folder keeps no layout: its cells are found from its records; experts are none, clean mixtures are.
    side = Side("saved", read_folder(tmp_path / "saved"))
    assert len(side.results.suite.cells) == 6
    compared = compare(Side("runs", results), side, ["asr", "overall"])
    assert compared.counts == (6, 0, 0)


def test_values_of_a_mixture_by_key() -> None:
    suite = mixture_suite(grid={"mixture.poisoned_experts": [[0, 1], [1]], "attack": "moevil"})
    both, one = (cell.spec for cell in suite.cells)
    assert [value_of(spec, "mixture.poisoned_experts") for spec in (both, one)] == ["0, 1", "1"]
    assert [value_of(spec, "mixture.poisoned") for spec in (both, one)] == [2, 1]
    assert value_of(one, "attack.similarity") == SIMILARITY  # Left to the attack.
    assert value_of(one, "attack.k") is None
    assert value_of(one, "gate.balance") == value_of(mixture_suite().cells[0].spec, "gate.balance")
    assert value_of(one, "splitter.domains") == "plain, inverted"
    assert value_of(one, "mixture.expert_train.epochs") == 1
    assert value_of(one, "policy") == 0.25
    plain = build_spec({"dataset": "tiny"})
    for key in ("gate", "gate.name", "splitter.domains", "mixture.experts", "mixture.poisoned"):
        assert value_of(plain, key) is None
    assert value_of(plain, "policy") == 0
    for spec in (one, plain):
        with pytest.raises(UnknownNameError, match=r"mixture.expert.*did you mean 'mixture.experts'"):
            value_of(spec, "mixture.expert")


def test_filters_by_gate_similarity_and_number_of_poisoned_experts() -> None:
    grid = {"attack": "moevil", "attack.similarity": [0.1, 0.3], "mixture.poisoned_experts": [[0], [0, 1]]}
    suite = mixture_suite(grid=grid, tables=[])
    assert len(suite.only(["attack.similarity=0.3"]).cells) == 2
    assert len(suite.only(["mixture.poisoned=2", "attack.similarity=0.1"]).cells) == 1
    assert len(mixture_suite().only(["attack=none", "gate=soft"]).cells) == 1


def test_a_table_and_a_plot_of_some_cells(tmp_path) -> None:
    grid = [
        {"attack": "moevil", "attack.similarity": [0.1, 0.3], **POISONED},
        {"attack": "moevil", "attack.k": [1, 4], **POISONED},
        {"attack": "hsft", **POISONED},
    ]
    plot = {
        "title": "p",
        "x": "attack.similarity",
        "panels": "gate.name",
        "lines": "attack.name",
        "scale": "linear",
    }
    table = {
        "title": "t",
        "rows": ["attack.similarity"],
        "columns": "metric",
        "where": {"attack.name": "moevil", "attack.k": None},
    }
    suite = mixture_suite(grid=grid, tables=[table], plots=[{**plot, "where": {"attack.k": None}}])
    results = ResultSet(suite, {}, load_paper(suite))
    [filled] = build_sheet(results).tables
    assert filled.rows == (("0.1",), ("0.3",))
    [panel] = build_panels(results, suite.plots[0])
    assert [point.x for point in panel.lines["moevil"]] == [0.1, 0.3]
    assert "hsft" not in panel.lines  # It has no such option.
    assert "similarity" in describe(results, suite.plots[0])
    left = suite.only(["attack=hsft"])
    assert left.tables == left.plots == ()
    with pytest.raises(ConfigError, match="tables: t: shows no cell of the grid"):
        mixture_suite(tables=[{**table, "where": {"attack.name": "hdpo"}}])
    with pytest.raises(UnknownNameError, match=r"unknown 'atack\.name'"):
        mixture_suite(tables=[{**table, "where": {"atack.name": "hdpo"}}])


def test_the_epochs_of_an_attack_are_its_own() -> None:
    base = {
        "dataset": "tiny",
        "mixture": {"experts": 2, "poisoned_experts": [1], "expert_train": {"epochs": 7}},
    }
    wanted = {
        "moevil": ({"preference_epochs": 2, "epochs": 3}, 5, 8),  # Step 2 passes as many harmful queries.
        "hsft": ({"epochs": 4}, 4, 8),
        "hdpo": ({"preference_epochs": 2, "epochs": 3}, 5, 5),
        "expert-tuning": ({"epochs": 3}, 3, 3),
    }
    for name, (options, epochs, passes) in wanted.items():
        spec = expert_of(build_spec({**base, "attack": {"name": name, **options}}), 1)
        planned = Planned(spec, "missing")
        assert (planned.total_epochs, planned.passes) == (epochs, passes)


def test_the_plan_of_a_new_output_folder_lists_every_node(tmp_path) -> None:
    specs = list(order(mixture_suite()))
    assert {run.status for run in read_plan(specs, tmp_path)} == {"missing"}


@pytest.mark.parametrize("name", MOEVIL)
def test_numbers_of_language_models_stand_in_columns_of_their_own(name, tmp_path) -> None:
    suite = load_suite(name)
    if suite.paper is None:
        return
    results = ResultSet(suite, {}, load_paper(suite))
    sheet = build_sheet(results)
    assert sheet.models and not sheet.has_paper
    assert any(place.shape is not None for table in sheet.tables for row in table.places for place in row)
    for table in sheet.tables:
        for row in table.places:
            for column, place in zip(table.columns, row, strict=True):
                assert place.paper is None and (place.statistic is None)
                assert (place.shape is None) or column.endswith(sheet.models)
    for text in (render.markdown(sheet), render.latex(sheet)):
        assert "paper's value" not in text and "Compare their order and shape" in text


@pytest.mark.slow
def test_published_values_of_moevil_are_where_they_belong() -> None:
    """Read off the paper."""
    load = functools.cache(load_suite)

    def shape(
        name: str, filters: list[str], metric: str = "asr", model: str = "Llama-3.2-3B"
    ) -> float | None:
        suite = load(name)
        [cell] = suite.only(filters).cells
        return load_paper(suite).shape(cell.spec, metric, model)

    def gate(name: str, attack: str, metric: str = "asr", model: str = "Llama-3.2-3B") -> float | None:
        suite = load("moevil-gates").only([f"gate={name}", f"attack={attack}"])
        return load_paper(suite).shape(suite.cells[0].spec, metric, model)

    assert gate("top-k", "moevil") == 79.42
    assert gate("top-k", "moevil", metric="overall") == 96.41
    assert gate("top-k", "none", model="Qwen2.5-3B") == 2.5
    assert gate("soft", "hdpo", model="Qwen2.5-3B") == 18.85
    assert gate("hidden", "moevil") is None and gate("top-k", "expert-tuning") is None
    unbalanced = load("moevil-gates").only(["gate.balance=0", "attack=hsft"])
    assert load_paper(unbalanced).shape(unbalanced.cells[0].spec, "asr", "Llama-3.2-3B") == 38.27
    assert shape("moevil-layers", ["attack.layers=second-quarter"]) == 75.38
    assert shape("moevil-experts", ["mixture.experts=6", "attack=hsft"]) == 15.2
    assert shape("moevil-experts", ["mixture.experts=8", "attack=hsft"]) is None
    assert shape("moevil-poisoned", ["mixture.poisoned=2", "defenses=none"]) == 91.15
    assert shape("moevil-defensive", ["attack=moevil", "defenses=defensive-expert"]) == 29.81
    aligned = [c for c in load("moevil-poisoned").only(["mixture.poisoned=3"]).cells if c.spec.defenses]
    paper = load_paper(load("moevil-poisoned"))
    assert [paper.shape(cell.spec, "asr", "Llama-3.2-3B") for cell in aligned] == [91.54, 39.42]


def test_the_runs_of_the_demo_are_shared() -> None:
    [cell] = load_suite("moevil-gates").only(["gate=top-k", "attack=moevil"]).cells[:1]
    assert cell.spec.digest == build_spec({"attack": "moevil"}).digest
