"""What a plug-in says of a recipe for its own models, and for no others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backdoorbench_moe.config import build_spec, load_recipe
from backdoorbench_moe.errors import PluginError, UnknownNameError

QUICK = "train: {epochs: 9, lr: 0.5}\nmodels: {slow: {depth: 3}, pmoe: {top_k: 1}}\n"


def put_package(folder: Path, *, recipe: str | None = QUICK, init: str = "") -> None:
    """A package that offers the models "slow" and "steady" and a file for "quick", as pip leaves it."""
    (folder / "slow_models" / "recipes").mkdir(parents=True)
    (folder / "slow_models" / "__init__.py").write_text(init)
    if recipe is not None:
        (folder / "slow_models" / "recipes" / "fast.yaml").write_text(recipe)
    info = folder / "slow_models-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-models\nVersion: 0.2\n")
    (info / "entry_points.txt").write_text(
        "[backdoorbench_moe.models]\nslow = slow_models.none:Slow\nsteady = slow_models.none:Steady\n"
        "[backdoorbench_moe.recipes]\nquick = slow_models.recipes:fast\n"
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("slow_models", None)


def test_it_counts_for_the_packages_own_models_over_the_built_in_one(place) -> None:
    put_package(place)
    built_in = build_spec({"recipe": "quick"})
    slow, steady = (build_spec({"recipe": "quick", "model": name}) for name in ("slow", "steady"))
    assert (slow.train.epochs, slow.train.lr) == (9, 0.5) == (steady.train.epochs, steady.train.lr)
    assert slow.train.optimizer == built_in.train.optimizer == "adamw"
    assert slow.model.options == {"depth": 3} and steady.model.options == {}
    assert build_spec({"recipe": "quick", "model": "slow", "train": {"lr": 0.1}}).train.lr == 0.1
    assert "slow_models.none" not in sys.modules, "no model is imported for its recipe"


def test_its_settings_of_mixtures_count_for_mixtures_alone(place) -> None:
    put_package(
        place, recipe="train: {epochs: 9}\nmixture: {train: {epochs: 7}, mixture: {gate_train: {lr: 0.5}}}\n"
    )
    dense, merged = (build_spec({"model": "slow", "attack": name}) for name in ("data-poisoning", "moevil"))
    assert dense.train.epochs == 9 and dense.mixture is None
    assert merged.train.epochs == 7 and merged.mixture is not None
    built_in = build_spec({"attack": "moevil"}).mixture
    assert built_in is not None and merged.mixture.gate_train == replace(built_in.gate_train, lr=0.5)
    assert merged.mixture.expert_train == built_in.expert_train


def test_other_models_and_other_recipes_are_untouched(place) -> None:
    before = build_spec({"recipe": "quick"}), load_recipe("paper")
    put_package(place)
    assert (build_spec({"recipe": "quick"}), load_recipe("paper")) == before
    assert load_recipe("paper", "slow") == before[1]
    with pytest.raises(UnknownNameError, match="recipe: unknown 'fast'"):
        load_recipe("fast", "slow")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"recipe": None}, "recipe 'quick' from slow-models 0.2 cannot be read: FileNotFoundError"),
        ({"init": "raise SystemExit('no')"}, "from slow-models 0.2 cannot be read: SystemExit: no"),
        ({"recipe": "a: ["}, "recipe 'quick' of model 'slow': not valid YAML"),
        ({"recipe": "- a"}, "recipe 'quick' of model 'slow': expected a mapping"),
        ({"recipe": "models: [1]"}, "recipe 'quick' of model 'slow': expected a mapping"),
        (
            {"recipe": "models: {slow: null}"},
            "expected a mapping, with the options of a model under models.NAME",
        ),
        ({"recipe": "trian: {epochs: 2}"}, "recipe 'quick' of model 'slow': .*'trian'; did you mean 'train'"),
        (
            {"recipe": "train: {lr: 0.1, lr: 0.2}"},
            "recipe 'quick' of model 'slow': not valid YAML: 'lr' twice",
        ),
        ({"recipe": "models: {slow: {since: 2020-01-01}}"}, "recipe 'quick' of model 'slow'"),
        (
            {"recipe": "mixture: [1]"},
            "recipe 'quick' of model 'slow': mixture: expected a mapping, got \\[1\\]",
        ),
        (
            {"recipe": "mixture: null"},
            "recipe 'quick' of model 'slow': mixture: expected a mapping, got None",
        ),
        (
            {"recipe": "mixture: {experts: 2}"},
            "recipe 'quick' of model 'slow': mixture: config: key: unknown 'experts'",
        ),
        (
            {"recipe": "mixture: {mixture: {gate_train: {epochs: 0}}}"},
            "recipe 'quick' of model 'slow': mixture: mixture.gate_train.epochs: expected at least 1, got 0 "
            r"\(from slow-models 0.2\)",
        ),
    ],
)
def test_a_broken_one_is_named_and_stops_no_other_model(place, broken, reason) -> None:
    put_package(place, **broken)
    with pytest.raises(PluginError, match=reason):
        build_spec({"recipe": "quick", "model": "slow"})
    assert build_spec({"recipe": "quick", "model": "pmoe"}).train.epochs == 6


def test_a_package_for_another_interface_has_no_say(place) -> None:
    put_package(place)
    points = place / "slow_models-0.2.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[backdoorbench_moe.interface]\n9 = slow_models\n")
    assert load_recipe("quick", "slow") == load_recipe("quick")
