"""Suites: laid out, filtered, ordered, refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from suites import BASE, GRID, tiny_suite

from backdoorbench_moe.bench.running.plan import with_place
from backdoorbench_moe.bench.suites.paper import load_paper
from backdoorbench_moe.bench.suites.reading import list_scales, list_suites, load_suite, parse_suite
from backdoorbench_moe.bench.suites.suite import order, value_of
from backdoorbench_moe.engine.graph import clean_twin, needs
from backdoorbench_moe.errors import BbmoeError, ConfigError, UnknownNameError
from backdoorbench_moe.registry import registry_of


def test_every_combination_once_in_the_order_of_the_file() -> None:
    cells = [(c.spec.trigger.to_dict(), c.spec.poison.rate) for c in tiny_suite().cells]
    square, blend = {"name": "square", "size": 4}, {"name": "blend"}
    assert cells == [(square, 0.25), (square, 0.5), (blend, 0.25), (blend, 0.5)]


def test_several_grids_follow_each_other() -> None:
    suite = tiny_suite(
        grid=[{"applicator": "image", "trigger": "square"}, {"applicator": "patch", "trigger": "blend"}]
    )
    assert [(c.spec.applicator.name, c.spec.trigger.name) for c in suite.cells] == [
        ("image", "square"),
        ("patch", "blend"),
    ]


def test_a_dotted_key_adds_to_a_part() -> None:
    suite = tiny_suite(grid={"trigger": "warp", "trigger.grid_size": [2, 3], "applicator": "image"})
    assert [c.spec.trigger.to_dict() for c in suite.cells] == [
        {"name": "warp", "grid_size": 2},
        {"name": "warp", "grid_size": 3},
    ]


def test_a_part_keeps_its_dotted_options_wherever_they_stand() -> None:
    base = {**BASE, "trigger": "blend"}
    suite = tiny_suite(base=base, grid={"trigger.size": [2, 3], "trigger": "square", "applicator": "image"})
    assert [c.spec.trigger.to_dict() for c in suite.cells] == [
        {"name": "square", "size": 2},
        {"name": "square", "size": 3},
    ]


def test_a_scale_whose_models_are_no_models_is_refused(tmp_path) -> None:
    (tmp_path / "scales").mkdir()
    (tmp_path / "mine.yaml").write_text("title: t\nversion: 1\nscales: [mini]\ngrid: {trigger: square}\n")
    for text in ("models: [pmoe]", "models: {pmoe: 2}"):
        (tmp_path / "scales" / "mini.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"scale: models.*: expected a mapping"):
            load_suite(str(tmp_path / "mine.yaml"))


def test_the_suite_wins_over_its_scale_and_the_scale_over_the_recipe(tmp_path) -> None:
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "mini.yaml").write_text(
        "note: half\ntrain: {epochs: 3, lr: 0.5}\nmodels: {wide_resnet: {widen_factor: 1}, pmoe: {widen_factor: 7}}"
    )
    (tmp_path / "mine.yaml").write_text(
        "title: t\nversion: 1\nscales: [mini]\n"
        "base: {recipe: paper, dataset: tiny, trigger: square, applicator: image, train: {lr: 0.25}}\n"
        "grid: {model: [pmoe, wide_resnet, {name: pmoe, widen_factor: 1}]}\n"
    )
    suite = load_suite(str(tmp_path / "mine.yaml"))
    assert (suite.name, suite.scale, suite.note, suite.label) == ("mine", "mini", "half", "mine-mini")
    first, second, third = (cell.spec for cell in suite.cells)
    assert (first.train.epochs, first.train.lr, first.train.batch_size) == (3, 0.25, 128)
    assert first.model.to_dict() == {"name": "pmoe", "widen_factor": 7}
    assert second.model.to_dict() == {"name": "wide_resnet", "widen_factor": 1}
    assert third.model.options["widen_factor"] == 1


def test_a_surrogate_has_the_options_of_the_scale_as_a_victim_has(tmp_path) -> None:
    """So it is the clean twin of another cell, and is trained once for both."""
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "mini.yaml").write_text("models: {wide_resnet: {widen_factor: 3}}")
    (tmp_path / "mine.yaml").write_text(
        "title: t\nversion: 1\nscales: [mini]\nbase: {dataset: tiny, applicator: image}\n"
        "grid:\n"
        "- {model: pmoe, trigger: {name: narcissus, surrogate: wide_resnet}}\n"
        "- {model: wide_resnet, trigger: square}\n"
    )
    suite = load_suite(str(tmp_path / "mine.yaml"))
    victim, other = (cell.spec for cell in suite.cells)
    assert victim.surrogate == other.model and other.model.options["widen_factor"] == 3
    assert needs(victim)["surrogate"] == clean_twin(other) and len(suite.nodes) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grids": {}}, "suite tiny: key: unknown 'grids'; did you mean 'grid'"),
        ({"version": 0}, "suite tiny: version: expected an integer of at least 1, got 0"),
        ({"repeats": True}, "suite tiny: repeats: expected an integer of at least 1, got True"),
        ({"repeats": 10**11}, "suite tiny: repeats: expected at most 10000"),
        ({"grid": {}}, "suite tiny: grid: expected at least one key"),
        ({"grid": {"poison.rate": []}}, "suite tiny: grid: poison.rate: expected at least one value"),
        (
            {"grid": {**GRID, "poison.rate": [2.0]}},
            r"poison.rate=2.0: poison.rate: expected a number in \(0, 1\]",
        ),
        ({"grid": {**GRID, "poison.rte": [0.1]}}, "unknown 'rte'; did you mean 'rate'"),
        ({"grid": {**GRID, "poison.rate": [0.25, "25%"]}}, "is the same run as"),
        (
            {"grid": {**GRID, "poison.target": ["stop"]}},
            r"suite tiny: grid: .*poison.target=stop: poison.target: expected a class number .* got 'stop'",
        ),
        ({"grid": {**GRID, "seed": [0.5]}}, "seed: expected"),
        ({"scales": "small"}, "scales: expected a list of names"),
        ({"scales": ["huge"]}, "scale: unknown 'huge'"),
        ({"tables": [{"title": "t", "rows": ["poison.rat"], "columns": "seed"}]}, "unknown 'poison.rat'"),
        (
            {"tables": [{"title": "t", "rows": ["seed"], "columns": "seed", "metrics": ["acc"]}]},
            "metric: unknown 'acc'",
        ),
        ({"tables": [{"titel": "t"}]}, "tables: key: unknown 'titel'; did you mean 'title'"),
        ({"tables": [{"title": "t"}]}, "suite tiny: tables: t: rows: expected it to be given, got None"),
        ({"plots": [{"x": "seed"}]}, "suite tiny: plots: title: expected it to be given, got None"),
        (
            {"tables": [{"title": "t", "rows": ["sed"], "columns": "trigger"}]},
            "suite tiny: tables: t: rows: key: unknown 'sed'; did you mean 'seed'",
        ),
        (
            {"tables": [{"title": "t", "rows": ["trigger"], "columns": "metrics"}]},
            "suite tiny: tables: t: columns: key: unknown 'metrics'; did you mean 'metric'",
        ),
        (
            {"plots": [{"title": "p", "panels": "modle"}]},
            "suite tiny: plots: p: panels: key: unknown 'modle'; did you mean 'model'",
        ),
        (
            {"plots": [{"title": "p", "x": "gate.top_k"}]},
            "suite tiny: plots: p: x: expected a key that has a value in some cell, got 'gate.top_k'",
        ),
        (
            {"plots": [{"title": "p", "x": "trigger.sise"}]},
            r"suite tiny: plots: p: x: key: unknown 'trigger\.sise'; did you mean 'trigger\.size'",
        ),
        (
            {"tables": [{"title": "t", "rows": ["trigger.rati"], "columns": "seed"}]},
            r"suite tiny: tables: t: rows: key: unknown 'trigger\.rati'; did you mean 'trigger\.ratio'",
        ),
        (
            {"tables": [{"title": "t", "rows": ["seed"], "columns": "seed", "where": {"model.witdh": 2}}]},
            r"suite tiny: tables: t: where: key: unknown 'model\.witdh'",
        ),
        (
            {"paper": {"file": "badpatches_tables_1_2", "where": {"triger": "square"}}},
            "suite tiny: paper: where: key: unknown 'triger'; did you mean 'trigger'",
        ),
        (
            {"plots": [{"title": "p", "where": {"trigger": "squares"}}]},
            "plots: p: shows no cell of the grid; where: trigger: expected 'square, size=4' or 'blend', got 'squares'",
        ),
        ({"plots": [{"title": "t", "x": "sed"}]}, "unknown 'sed'; did you mean 'seed'"),
        ({"paper": 3}, "paper: expected"),
        ({"paper": {"file": "badpatches_tables_1_2", "where": ["pmoe"]}}, "where: expected a mapping"),
        ({"title": None}, "title: expected a string, got None"),
        ({"grid": []}, r"grid: expected at least one key, got \[\]"),
        ({"grid": [["square"]]}, r"grid\[0\]: expected a mapping"),
        ({"grid": {**GRID, "model": [None]}}, "model: expected a name"),
        ({"base": {**BASE, "model": 3}}, "model: expected a name"),
        ({"base": {**BASE, "dataset": ["tiny"]}}, "dataset: expected a name"),
        ({"grid": {**GRID, "seed": [0, 1]}}, "is the same run as .*; for more seeds per cell, use repeats"),
        ({"tables": [{"title": "t", "rows": "seed", "columns": "seed"}]}, "rows: expected a list"),
        ({"tables": [{"title": "t", "rows": [1], "columns": "seed"}]}, "rows: expected a string, got 1"),
        ({"tables": [{"title": "t", "rows": [], "columns": "seed"}]}, "rows: expected at least one"),
        ({"tables": [{"title": "t", "rows": ["seed"], "columns": ["seed"]}]}, "columns: expected a string"),
        ({"plots": [{"title": 2024}]}, "title: expected a string, got 2024"),
    ],
)
def test_what_a_suite_cannot_have_is_named(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_suite(**values)


def test_unknown_suites_and_scales_are_named_with_near_ones(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="suite: unknown 'smok'; did you mean 'smoke'"):
        load_suite("smok")
    with pytest.raises(UnknownNameError, match="unknown 'smal'; did you mean 'small'"):
        load_suite("badpatches-table1", "smal")
    with pytest.raises(ConfigError, match="--scale: suite smoke has no scales"):
        load_suite("smoke", "small")
    with pytest.raises(UnknownNameError, match="suite: unknown 'xxx"):
        load_suite("x" * 300)
    with pytest.raises(UnknownNameError, match="or the path of a file"):
        load_suite("nothing")


def test_a_missing_file_is_named_without_the_list_of_suites(tmp_path) -> None:
    (tmp_path / "mine.yaml").touch()
    for name, message in (
        (str(tmp_path / "nothing-here.yaml"), r"suite: '\S+nothing-here\.yaml' not found"),
        (str(tmp_path / "mien.yml"), r"suite: '\S+mien\.yml' not found; did you mean 'mine\.yaml'\?"),
        ("nothing.yml", r"suite: 'nothing\.yml' not found"),
        ("smok.yaml", r"suite: 'smok\.yaml' not found; did you mean 'smoke'\?"),
        (str(tmp_path), rf"suite: expected a file, got the folder '{tmp_path}'"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            load_suite(name)


def test_a_broken_file_is_called_what_it_is(tmp_path) -> None:
    own, scale = tmp_path / "own.yaml", tmp_path / "scales" / "own.yaml"
    scale.parent.mkdir()
    own.write_text("grid: [")
    with pytest.raises(ConfigError, match=r"^suite file \S+own\.yaml: not valid YAML: "):
        load_suite(str(own))
    own.write_text("{title: own, version: 1, scales: [own], grid: {poison.rate: 0.1}}")
    scale.write_text("[]")
    with pytest.raises(ConfigError, match=r"^scale file \S+own\.yaml: expected a mapping, got \[\]"):
        load_suite(str(own))


def test_filters_take_any_key_and_rates_as_percent() -> None:
    suite = tiny_suite()
    assert len(suite.only(["trigger=square"]).cells) == 2
    assert len(suite.only(["poison.rate=25%,0.5"]).cells) == 4
    assert len(suite.only(["trigger=blend", "poison.rate=0.5"]).cells) == 1
    for text, message in (
        ("trigger", "--only: expected 'key=value"),
        ("trigger=blnd", "did you mean 'blend'"),
        ("poison.rate=3%", "known: 0.25, 0.5"),
        ("colour=red", "--only: key: unknown 'colour'"),
        ("trigger.sise=4", r"--only: key: unknown 'trigger\.sise'; did you mean 'trigger\.size'"),
        ("trigger=blend,poison.rate=25%", "use a separate --only for another key"),
    ):
        with pytest.raises(ConfigError, match=message.replace("'key", "'?key")):
            suite.only([text])


def test_tables_and_plots_select_rates_as_percent() -> None:
    table = {"title": "t", "rows": ["trigger"], "columns": "metric", "where": {"poison.rate": "25%"}}
    suite = tiny_suite(tables=[table], plots=[{"title": "p", "where": {"poison.rate": "25%"}}])
    for item in (*suite.tables, *suite.plots):
        assert [item.shows(cell.spec) for cell in suite.cells] == [True, False, True, False]
    with pytest.raises(ConfigError, match=r"where: poison\.rate: expected 0\.25 or 0\.5, got 0\.03"):
        tiny_suite(tables=[{**table, "where": {"poison.rate": "3%"}}])


def test_a_part_without_options_is_told_from_one_with_options() -> None:
    grid = {
        "applicator": "image",
        "trigger": ["square", {"name": "square", "size": 4}],
        "poison.rate": [0.25],
    }
    table = {"title": "t", "rows": ["trigger"], "columns": "metric", "where": {"trigger": "square"}}
    suite = tiny_suite(grid=grid, tables=[table])
    assert [suite.tables[0].shows(cell.spec) for cell in suite.cells] == [True, False]


@pytest.mark.parametrize("given", ["square", "square, size=4"])
def test_tables_and_plots_select_parts_by_name_or_with_their_options(given) -> None:
    table = {"title": "t", "rows": ["poison.rate"], "columns": "metric", "where": {"trigger": given}}
    suite = tiny_suite(tables=[table], plots=[{"title": "p", "where": {"trigger": given}}])
    for item in (*suite.tables, *suite.plots):
        shown = [cell.spec.trigger.name for cell in suite.cells if item.shows(cell.spec)]
        assert shown == ["square", "square"]


def test_repeats_come_one_after_another_twins_first() -> None:
    suite = tiny_suite(repeats=2)
    specs = list(order(suite))
    assert [spec.seed for spec in specs] == [0] * 5 + [1] * 5
    assert [(not spec.attacked) for spec in specs] == ([True] + [False] * 4) * 2
    assert len({spec.digest for spec in specs}) == 10


def test_a_defended_run_comes_after_what_it_is_made_from() -> None:
    suite = tiny_suite(grid={**GRID, "trigger": "square", "defenses": [["fine-tuning"], []]})
    for spec in (specs := list(order(suite))):
        if spec.defenses:
            parent = next(each for each in specs if not each.defenses and each.poison == spec.poison)
            assert specs.index(parent) < specs.index(spec)
    assert len(specs) == 1 + 2 + 2


def test_the_place_of_the_data_changes_no_digest() -> None:
    suite = tiny_suite(base={**BASE, "dataset": "cifar10"})
    moved = with_place(suite, {"root": "elsewhere"}, "cpu")
    assert moved.cells[0].spec.dataset.options["root"] == "elsewhere"
    assert moved.digest == suite.digest


def test_values_of_a_spec_by_key() -> None:
    spec = tiny_suite().cells[0].spec
    assert value_of(spec, "trigger") == "square, size=4"
    assert value_of(spec, "trigger.name") == "square"
    assert value_of(spec, "trigger.colour") == "black"  # The default, which the spec leaves to the trigger.
    assert value_of(spec, "trigger.shade") is None
    assert value_of(spec, "train.batch_size") == 32
    assert value_of(clean_twin(spec), "trigger.name") is None
    with pytest.raises(UnknownNameError):
        value_of(spec, "train.batch")


@pytest.mark.slow
@pytest.mark.parametrize("name", list_suites())
def test_the_projects_suites_lay_out_at_every_scale(name) -> None:
    for scale in list_scales(name) or [None]:
        suite = load_suite(name, scale)
        assert suite.cells and suite.tables and suite.title
        assert suite.note or scale is None
        load_paper(suite)


def test_scales_of_ones_own_suite_that_are_no_list_are_refused(tmp_path) -> None:
    """The letters of a word would be listed as scales."""
    file = tmp_path / "mine.yaml"
    for text, scales in (("[small, full]", ["small", "full"]), ("", [])):
        file.write_text(f"scales: {text}\n")
        assert list_scales(str(file)) == scales
    for text in ("small", "{small: 1}"):
        file.write_text(f"scales: {text}\n")
        with pytest.raises(ConfigError, match=r"mine\.yaml: scales: expected a list of names, got"):
            list_scales(str(file))


@pytest.mark.parametrize(("name", "table"), [("badpatches-table1", "1"), ("badpatches-table2", "2")])
def test_the_paper_suites_have_the_papers_cells(name, table) -> None:
    suite = load_suite(name, "full")
    paper = load_paper(suite)
    assert len(suite.cells) == len(paper.rows) == 36
    assert all(row["table"] == table for row in paper.rows)
    for metric in ("asr", "ba", "cad"):
        found = sorted(paper.value(cell.spec, metric) for cell in suite.cells)
        assert found == sorted(float(row[metric]) for row in paper.rows)
    # Read off the paper: Table 1, image, square, 0.5%.
    if table == "1":
        cell = suite.only(["applicator=image", "trigger=square", "poison.rate=0.5%"]).cells[0]
        assert [paper.value(cell.spec, metric) for metric in ("asr", "ba", "cad")] == [90.7, 83.5, 1.5]


@pytest.mark.slow
def test_a_published_table_speaks_only_of_what_it_says(tmp_path) -> None:
    suite = load_suite("dense-baselines", "small")
    paper = load_paper(suite)
    spoken = {cell.spec.model.name for cell in suite.cells if paper.value(cell.spec, "asr") is not None}
    assert spoken == {"pmoe"}
    for text, message in (
        ("trigger,poison_rate_percent,asr\nsquare,ten,1\n", "line 2: expected names and numbers"),
        ("trigger,asr\nsquare,high\n", "line 2: expected names and numbers"),
        ("trigger,asr\nsquare\n", "line 2: expected names and numbers"),
        ("trigger,asr\nsquäre,1\n", "cannot be read"),
    ):
        (tmp_path / "odd.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=message):
            load_paper(tiny_suite(paper={"file": str(tmp_path / "odd.csv")}))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BbmoeError, match=r"published table bad.csv: expected the columns"):
        load_paper(tiny_suite(paper={"file": str(tmp_path / "bad.csv")}))


@pytest.mark.parametrize("name", ["fine-tuning", "fine-pruning"])
def test_a_table_of_undefended_models_is_not_compared_with_defended_ones(name) -> None:
    """Tables 1 and 2 state no defense and no stage; Table 3 states both."""
    part = {"name": name, **({"ratio": 0.2} if name == "fine-pruning" else {})}
    grid = {"trigger": "square", "applicator": "patch", "poison.rate": "2%", "defenses": [[], [part]]}
    base = {"recipe": "paper", "dataset": "cifar10"}
    suite = tiny_suite(base=base, grid=grid, paper={"file": "badpatches_tables_1_2", "table": 1})
    plain, defended = (cell.spec for cell in suite.cells)
    paper = load_paper(suite)
    assert [paper.value(plain, key) for key in ("asr", "pruned.asr", "task/1.asr")] == [100.0, None, None]
    assert [paper.value(defended, key) for key in ("asr", "pruned.asr", "ba")] == [None] * 3
    third = load_paper(tiny_suite(base=base, grid=grid, paper={"file": "badpatches_table_3"}))
    assert third.value(plain, "asr") == 100.0
    assert (third.value(defended, "asr") is not None) == (name == "fine-pruning")


def test_only_matches_defenses_by_their_names() -> None:
    suite = load_suite("moevil-poisoned")
    aligned = suite.only(["defenses=align", "mixture.poisoned=1"])
    assert [cell.spec.defenses[0].options["scope"] for cell in aligned.cells] == ["gates", "gates+experts"]
    assert not suite.only(["defenses=none", "mixture.poisoned=1"]).cells[0].spec.defenses
    with pytest.raises(
        UnknownNameError, match="--only defenses: value: unknown 'aling'; did you mean 'align'"
    ):
        suite.only(["defenses=aling"])


def names_in(suite, key: str) -> set[str]:
    """The names of the triggers or defenses of a suite."""
    parts = [cell.spec.trigger if key == "trigger" else cell.spec.defenses for cell in suite.cells]
    return {part.name for each in parts if each for part in (each if isinstance(each, tuple) else (each,))}


def built_in(kind: str) -> set[str]:
    registry = registry_of(kind)
    return {offer.name for offer in registry.offers() if offer.builtin}


@pytest.mark.parametrize("name", ["standard-attacks", "standard-defenses"])
def test_the_standard_suites_are_the_same_at_the_scale_small_as_written_out(name) -> None:
    """The scale gives recipe and data set, so a run of the suite `dense-baselines` is the same as here."""
    other = {cell.spec.digest for cell in load_suite("dense-baselines", "small").cells}
    suite = load_suite(name, "small")
    as_there = {
        replace(cell.spec, poison=replace(cell.spec.poison, rate=0.02)).digest
        for cell in suite.cells
        if not cell.spec.defenses and cell.spec.trigger.name in ("square", "blend", "warp")
    }
    assert as_there <= other and len(as_there) == 12


def test_the_standard_suites_leave_no_trigger_and_no_defense_out() -> None:
    # The images of `stored` are those of another tool.
    assert names_in(load_suite("standard-attacks"), "trigger") == built_in("trigger") - {"stored"}
    of_mixtures = {"align", "defensive-expert", "rasa"}
    assert names_in(load_suite("standard-defenses"), "defenses") == built_in("defense") - of_mixtures


def test_a_scale_names_the_data_set_of_suites_that_name_none(tmp_path) -> None:
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "half.yaml").write_text(
        "note: n\nrecipe: paper\ndataset: {name: cifar10, train_images: 100}\n"
    )
    values = {"title": "T", "version": 1, "scales": ["half"], "grid": {"trigger": "square"}}
    plain, other = (
        parse_suite({**values, **more}, "s", "half", folder=tmp_path).cells[0].spec
        for more in ({}, {"base": {"dataset": "gtsrb", "recipe": "quick"}})
    )
    assert (plain.dataset.to_dict(), plain.recipe) == ({"name": "cifar10", "train_images": 100}, "paper")
    assert (other.dataset.to_dict(), other.recipe) == ({"name": "gtsrb", "train_images": 100}, "quick")
