"""From an attack to its analysis and defenses, with the plug-in's models."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from backdoorbench_moe import analyze, attack, defend
from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.config import load_recipe
from backdoorbench_moe.errors import ConfigError

SUITES = Path(__file__).parents[1] / "suites"
SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_experts": 4, "moe_blocks": "all"}
DENSE = {"name": "timm:vit_tiny_patch16_224", "depth": 2, "embed_dim": 16, "num_heads": 2}
LAYERS = ["network.blocks.0.mlp", "network.blocks.1.mlp"]


def run(output, model, **values):
    given = {
        "recipe": "quick",
        "model": model,
        "dataset": {"name": "signs", "train_images": 60, "test_images": 40},
        "trigger": "blend",
        "applicator": "patch",
        "train": {"epochs": 1, "batch_size": 20},
        "precision": "fp32",
        "device": "cpu",
    }
    return attack(output=output, twin=False, **{**given, **values})[0]


@pytest.fixture(scope="module", params=["vmoe", "soft-moe"])
def attacked(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), {"name": request.param, **SMALL})


@pytest.mark.slow
def test_the_record_keeps_the_packages_version(attacked):
    packages = attacked.record.environment["packages"]
    assert packages["bbmoe-vmoe"] == version("bbmoe-vmoe") and "bbmoe-example" not in packages


@pytest.mark.slow
def test_every_layer_is_analyzed(attacked):
    found = analyze(attacked, carriers_images=8)
    assert [layer.layer for layer in found.findings.routing] == LAYERS
    over = "experts" if attacked.spec.model.name == "vmoe" else "patches"
    assert {layer.gates_over for layer in found.findings.routing} == {over}
    assert {layer.grid for layer in found.findings.routing} == {(8, 8)}
    names = [f"{layer}/{expert}" for layer in LAYERS for expert in range(4)]
    assert [muted.experts for muted in found.carriers.singles] == [(name,) for name in names]
    assert [patched.expert for patched in found.carriers.patched] == names
    assert [absent.part for absent in found.absent] == ["against", "probe"], "no clean twin, no probe"


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense",
    [
        {"name": "expert-drop", "epochs": 1},
        {"name": "expert-reset", "epochs": 1},
        {"name": "reroute"},
        {"name": "router-reset", "epochs": 1},
        {"name": "routing-strip", "blends": 4, "fpr": 0.25},
        {"name": "fine-tuning", "scope": "router", "epochs": 1},
        {"name": "fine-pruning", "epochs": 1},
    ],
    ids=lambda defense: defense["name"],
)
def test_defenses_work(attacked, defense):
    options = {key: value for key, value in defense.items() if key != "name"}
    done = defend(attacked, defense["name"], clean_fraction=0.5, **options)
    assert done.record.status == "finished" and done.record.metrics["asr"]["n"] > 0


@pytest.mark.slow
def test_a_run_that_began_with_a_dense_one_does_not_need_it_again(tmp_path):
    dense = run(tmp_path, DENSE)
    model = {"name": "vmoe", "upcycle": str(dense.folder.path), **SMALL}
    upcycled = run(tmp_path, model)
    assert len(upcycled.record.parts["model"]["upcycled_from"]) == 64
    clean = run(tmp_path, model, attack=None, trigger=None, applicator=None)
    assert not clean.spec.attacked and clean.folder.model_metadata()["backdoored"] == "true"
    (dense.folder.path / "model.safetensors").unlink()
    trained = upcycled.model()
    assert not trained.training
    again = defend(upcycled, "router-reset", epochs=1, clean_fraction=0.5)
    assert again.record.status == "finished"
    with pytest.raises(ConfigError, match=r"^upcycle: .*No such file"):
        run(tmp_path, model, seed=1)
    assert len(list(tmp_path.iterdir())) == 4, "nothing is written for a run that cannot start"


def test_quick_is_the_packages_own():
    own, built_in = load_recipe("quick", "soft-moe"), load_recipe("quick")
    assert own["train"]["epochs"] > built_in["train"]["epochs"]
    assert own["models"]["vmoe"] == own["models"]["soft-moe"] == {"depth": 4, "embed_dim": 96, "num_heads": 3}


def test_the_suite_is_three_models_three_triggers_and_two_ways_to_apply_them():
    suite = load_suite(str(SUITES / "transformers.yaml"))
    assert len(suite.cells) == 18 and suite.repeats == 2 and suite.scale == "small"
    assert {cell.spec.model.options["depth"] for cell in suite.cells} == {2}


@pytest.mark.slow
def test_the_standard_suite_has_what_the_built_in_ones_have_on_pmoe():
    """The same attacks and defenses as `standard-defenses`, and the same detectors as `false-alarms`.

    Only `bnp` is missing: a transformer has layer norms, which store no statistics.
    """

    def arms(*names: str, model: str) -> set[str]:
        cells = [cell for name in names for cell in load_suite(name, "quick").cells]
        specs = [cell.spec for cell in cells if cell.spec.model.name == model]
        specs = [spec for spec in specs if "bnp" not in {part.name for part in spec.defenses}]
        keys = ("trigger", "applicator", "poison", "defenses")
        return {json.dumps({key: spec.to_dict().get(key) for key in keys}) for spec in specs}

    ours = arms(str(SUITES / "standard-vmoe.yaml"), model="vmoe")
    assert ours == arms("standard-defenses", "false-alarms", model="pmoe")


def test_the_defenses_are_measured_on_attacks_of_the_other_suite():
    suite, attacks = (
        load_suite(str(SUITES / f"{name}.yaml")) for name in ("transformer-defenses", "transformers")
    )
    undefended = [cell.spec for cell in suite.cells if not cell.spec.defenses]
    assert len(suite.cells) == 44 and len(undefended) == 6
    specs = [cell.spec for cell in attacks.cells]
    assert all(spec in specs for spec in undefended)
