"""`bbmoe defend`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_spec

from backdoorbench_moe import api
from backdoorbench_moe.bench.running import estimate
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import BbmoeError

PRUNING = (
    "--defense",
    "fine-pruning",
    "--set",
    "ratio=0.25",
    "--set",
    "clean_fraction=0.5",
    "--set",
    "epochs=1",
)


@pytest.fixture
def victim(tmp_path) -> Run:
    """A finished run with its clean twin beside it."""
    return run_attack(tiny_spec(), output=tmp_path / "runs")[0]


@pytest.mark.slow
def test_it_prints_every_stage_and_makes_a_folder_beside_the_run(bbmoe, victim) -> None:
    code, out, err = bbmoe("defend", victim.folder.path, *PRUNING)
    assert code == 0 and "training fine-pruning: 1 epoch of 48 images" in err
    assert "to compare with fine-tuning on the same images: the same command with --format rich" in err
    [folder] = victim.folder.path.parent.glob("*-fine-pruning-*")
    record = json.loads((folder / "record.json").read_text())
    assert f"run folder: {folder}" in out and "square by image, 25% poisoned, fine-pruning" in out
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines if "run folder" not in line)
    for stage in record["stages"]:
        [line] = [line for line in lines if line.startswith(f"{stage['name']} ")]
        for name, metric in stage["metrics"].items():
            if name == "target_rate":
                assert f"{stage['name']} {metric['value']:.2f}" in out
                continue
            assert f"{metric['value']:.2f} [{metric['low']:.1f}, {metric['high']:.1f}]" in line
    assert f"(CAD): {record['metrics']['cad']['value']:.2f}" in out

    code, out, err = bbmoe("defend", victim.folder.path, *PRUNING, "--json")
    assert code == 0 and "found finished" in err and "training" not in err and "to compare" not in err
    [shown] = json.loads(out)["runs"]
    assert shown.pop("folder") == str(folder) and shown == record

    code, out, _ = bbmoe("show", folder)
    assert code == 0 and "pruned " in out and "(RA)" in out and "fine-pruning, ratio=0.25" in out
    assert victim.folder.path.name in "".join(out.split())
    assert "fine-pruning, ratio=0.25" in bbmoe("show", victim.folder.path, folder, "--markdown")[1]


def test_the_same_from_python(victim, tmp_path) -> None:
    run = api.defend(
        victim.folder.path, "fine-tuning", scope="head", clean_fraction=0.5, output=tmp_path / "out"
    )
    assert run.folder.path.parent == tmp_path / "out"
    assert run.record.stages[-1]["metrics"]["ba"]["value"] == run.value("ba")
    again = api.defend(victim, "fine-tuning", scope="head", clean_fraction=0.5, output=tmp_path / "out")
    assert again.record == run.record
    with pytest.raises(
        BbmoeError, match=r"defense 'fine-tuning': option: unknown 'scop'; did you mean 'scope'"
    ):
        api.defend(victim, "fine-tuning", scop="head")


OF_PRUNING = "defense 'fine-pruning'"
TILES_OF_5 = ("--set", "applicator=patch", "--set", "patch_size=5", "--set", "clean_fraction=0.5")
BAD = {
    "unknown defense": (["--defense", "fine-prune"], "defense: unknown 'fine-prune'; did you mean 'fine-pruning'"),
    "no defense": ([], "Missing option '--defense'"),
    "pruning all": ([*PRUNING, "--set", "ratio=1"], f"{OF_PRUNING}: ratio: expected a number in [0, 1), got 1.0"),
    "ratio no number": ([*PRUNING, "--set", "ratio=lots"], f"{OF_PRUNING}: ratio: expected a number, got 'lots'"),
    "no such option": ([*PRUNING, "--set", "ratoi=1"], f"{OF_PRUNING}: option: unknown 'ratoi'; did you mean 'ratio'"),
    "the name": ([*PRUNING, "--set", "name=fine-tuning"], f"{OF_PRUNING}: option: unknown 'name'"),
    "nested": ([*PRUNING, "--set", "a.b=1"], f"{OF_PRUNING}: option: unknown 'a'"),
    "few images": ([*PRUNING, "--set", "clean_fraction=0.03"], f"{OF_PRUNING}: clean_fraction: 0.03 of 96 images is 2"),
    "scope": ([*PRUNING, "--set", "scope=expert"], f"{OF_PRUNING}: scope: unknown 'expert'; did you mean 'experts'"),
    "tiles": (["--defense", "i-bau", *TILES_OF_5], "defense 'i-bau': patch_size: expected a divisor of the image's 32"),
    "data root": ([*PRUNING, "--data-root", "x"], "--data-root (data_root=): expected none"),
    "device": ([*PRUNING, "--device", "gpu"], "device: expected"),
    "no key and value": ([*PRUNING, "--set", "ratio"], "--set: expected dotted.key=value"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_2(bbmoe, victim, tmp_path, args, message) -> None:
    before = sorted((tmp_path / "runs").rglob("*"))
    for more in ([], ["--output", tmp_path / "other"]):
        code, out, err = bbmoe("defend", victim.folder.path, "--quiet", *args, *more)
        assert (code, out) == (2, "") and message in err and "Traceback" not in err
        assert "Usage" in err or err.count("\n") == 1
    assert sorted((tmp_path / "runs").rglob("*")) == before and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_option_may_have_the_name_of_a_part(bbmoe, victim, monkeypatch) -> None:
    """A `trigger` or an `applicator` of a run spec is a part with options of its own, an option of a defense is not."""
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    tiles = ("--defense", "tile-tuning", "--set", "clean_fraction=0.5", "--set", "epochs=1")
    code, _, err = bbmoe(
        "defend", victim.folder.path, *tiles, "--set", "applicator=image", "--dry-run", "--json"
    )
    assert code == 0, err
    code, _, err = bbmoe("defend", victim.folder.path, *tiles, "--set", "applicator=tile")
    assert code == 2 and "applicator: unknown 'tile'; known: image, patch" in err


def test_what_is_no_finished_run_is_refused(bbmoe, victim, tmp_path) -> None:
    code, _, err = bbmoe("defend", tmp_path / "none", *PRUNING)
    assert code == 2 and "expected a folder with a record.json" in err
    victim.record.status = "interrupted"
    victim.folder.write(victim.record)
    code, _, err = bbmoe("defend", victim.folder.path, *PRUNING)
    assert (
        code == 2 and "expected a finished run, its status is 'interrupted'" in err and err.count("\n") == 1
    )
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_list_and_info_know_defenses(bbmoe) -> None:
    names = [part["name"] for part in json.loads(bbmoe("list", "defenses", "--json")[1])["parts"]]
    assert {"fine-pruning", "fine-tuning"} <= set(names)
    code, out, _ = bbmoe("info", "defense", "fine-pruning", "--json")
    options = json.loads(out)["options"]
    assert code == 0 and options["ranking"] == {"type": "'post-relu' | 'notebook'", "default": "post-relu"}
    assert options["clean_fraction"]["default"] == 0.05


@pytest.mark.slow
def test_it_says_how_right_the_judgement_about_classes_is(bbmoe, victim) -> None:
    cleanse = ("--defense", "neural-cleanse", "--set", "epochs=1", "--set", "unlearn=none")
    code, out, _ = bbmoe("defend", victim.folder.path, *cleanse, "--set", "clean_fraction=0.5")
    assert code == 0
    assert "attacker's classes flagged: " in out and " of 1 class\n" in out
    assert "other classes flagged: " in out and " of 2 classes\n" in out
    assert "judgement about the class: suspicious" in out
