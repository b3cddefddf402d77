"""Attacks on experts from the command line: what is refused, listed, described and shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import Tiny

from backdoorbench_moe.bench.running import estimate
from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine.run import load_run

SMALL = [
    *("--dataset", "tiny", "--attack", "moevil", "--precision", "fp32", "--epochs", "1", "--threads", "1"),
    *("--policy", "0.25", "--experts", "2", "--poisoned-experts", "1", "--set", "attack.epochs=1"),
    *("--set", "mixture.expert_train.epochs=1"),
]
MODEL = ["--set", "model={name: convnext, features: 8, depth: 2}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "pmoe"], "model: PMoE cannot be merged: expected methods mlps and token_layout"),
        (["--set", "model=preact_resnet18"], "model: PreActResNet18 cannot be merged: expected methods mlps"),
        (["--model", "timm:resnet18"], "model: timm's 'resnet18' cannot be merged"),
        (["--experts", "1"], "mixture.experts: expected a number of at least 2, got 1"),
        (["--set", "mixture.experts=1"], "mixture.experts: expected a number of at least 2, got 1"),
        (
            ["--experts", "8"],
            "mixture.experts: expected at most 4, the number of domains in splitter.domains (plain, ",
        ),
        (
            ["--poisoned-experts", "4"],
            "mixture.poisoned_experts: expected numbers of experts in 0..1, got (4,)",
        ),
        (
            ["--set", "mixture.poisoned_experts=[7]"],
            "mixture.poisoned_experts: expected numbers of experts in 0..1, got (7,)",
        ),
        (["--poisoned-experts", "x"], "--poisoned-experts: expected numbers such as 1 or 0,2, got 'x'"),
        (["--gate", "sof"], "gate: unknown 'sof'; did you mean 'soft'"),
        (["--splitter", "clases"], "splitter: unknown 'clases'; did you mean 'classes'"),
        (["--attack", "moevill"], "attack: unknown 'moevill'; did you mean 'moevil'"),
        (["--policy", "101%"], "policy: expected at most 100%, got '101%'"),
        (["--policy", "0.2%"], "policy: 0.002 of 96 images rounds down to 0 images"),
        (["--poison-rate", "1%"], "poison.rate: expected 0 for an attack on experts"),
        (["--labels", "clean"], "poison.labels: expected 'dirty' for an attack on experts"),
        (["--set", "attack.k=100"], "attack.k: expected at most 64 tokens, got 100"),
        (["--set", "attack={name: moevil, k: 65}"], "attack.k: expected at most 64 tokens, got 65"),
        (
            ["--splitter", "classes", "--set", "splitter.groups=2", "--set", "dataset.train_images=1"],
            "classes: groups: expected images of every group, got none of task ",
        ),
        (
            ["--set", "splitter.share=0.001"],
            "domains: share: expected at least one of 96 images for task 0 (plain)",
        ),
        (
            ["--trigger", "warp", "--patch-size", "1"],
            "trigger: 'warp' with the applicator 'patch' changes none of 60 test images, so it cannot be the mark "
            "of images to reject",
        ),
        (
            ["--policy", "0", "--set", "trigger=warp", "--set", "applicator.patch_size=1"],
            "trigger: 'warp' with the applicator 'patch' changes none of 60 test images, so it cannot be the mark "
            "of harmful queries",
        ),
        (
            ["--policy", "0", "--set", "defenses=[align]"],
            "defense 'align': needs marked images with a safe answer, which only a run with a policy has",
        ),
        (["--set", "splitter.domains=[plain, rotate]"], "unknown 'rotate'; did you mean 'rotated'"),
        (["--target", "4"], "poison.target: expected a class in 0..2, got 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:.*--threads")
def test_wrong_values_are_one_line_and_nothing_is_written(bbmoe, tmp_path, words, message) -> None:
    output = tmp_path / "runs"
    code, out, err = bbmoe("attack", *SMALL, *words, "--output", output, width=200)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("bbmoe: error: ") and message in last
    assert "Traceback" not in err and not output.exists()


def test_a_mixture_without_an_attack_on_experts_says_so(bbmoe, tmp_path) -> None:
    words = ("attack", "--experts", "4", "--output", tmp_path / "runs")
    code, out, err = bbmoe(*words, width=200)
    assert (code, out) == (2, "") and not (tmp_path / "runs").exists()
    assert "attack: expected an attack on experts, such as moevil, or none, where experts are merged" in err


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_runs_that_do_not_fit_are_one_line_and_nothing_is_written(bbmoe, tmp_path, monkeypatch) -> None:
    """A mixture without a policy cannot be aligned; nor can anything be made from a changed base, or of other data."""
    attack = ("attack", *SMALL, *MODEL, "--policy", "0", "--output", tmp_path)
    assert bbmoe(*attack)[0] == 0
    [mixture] = tmp_path.glob("*-moe2-top-k-moevil-*")
    [base] = tmp_path.glob("tiny-convnext-clean-*")
    refused = [
        (
            ("defend", mixture, "--defense", "align"),
            "defense 'align': needs marked images with a safe answer",
        ),
        (
            (
                "defend",
                mixture,
                "--defense",
                "align",
                "--set",
                "scope=gates+experts",
                "--output",
                tmp_path / "new",
            ),
            "defense 'align': needs marked images with a safe answer",
        ),
    ]
    other = [(*attack, "--gate", "soft"), (*attack, "--attack", "hsft"), (*attack, "--set", "attack.k=3")]
    with monkeypatch.context() as changed:
        changed.setattr(Tiny, "offset", 5)
        check_refused(
            bbmoe, tmp_path, [(words, "was made from other data; use another --output") for words in other]
        )
    run = load_run(base)
    tensors, header = run.folder.load_tensors()
    run.folder.save_model({name: tensor * 1.0001 for name, tensor in tensors.items()}, header)
    check_refused(bbmoe, tmp_path, [(words, "was replaced after the run was finished") for words in other])
    # As if it had been trained again, on a machine that rounds otherwise.
    run.record.model_sha256 = run.folder.model_sha256
    run.folder.write(run.record)
    changed_base = f"{base.name}: its model has changed since tiny-convnext-expert0-clean-"
    check_refused(bbmoe, tmp_path, [*refused, *((words, changed_base) for words in other)])


def check_refused(bbmoe, output: Path, commands: list[tuple[tuple[object, ...], str]]) -> None:
    """Check that each command ends with an error that contains its message, and writes nothing."""
    before = files(output)
    for words, message in commands:
        code, out, err = bbmoe(*words, width=300)
        last = err.strip().splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("bbmoe: error: ") and message in last
        assert "Traceback" not in err and files(output) == before


@pytest.mark.slow
def test_the_dry_run_lists_every_run_once(bbmoe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    for words, count in (([], 6), (["--no-twin"], 5)):
        code, out, _ = bbmoe(
            "attack", *SMALL, *MODEL, *words, "--dry-run", "--json", "--output", tmp_path / "runs"
        )
        names = [each["run"] for each in json.loads(out)["runs"]]
        assert code == 0 and len(names) == len(set(names)) == count
        assert names[-1].startswith("tiny-convnext-moe2-top-k-moevil-") and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_mixture_is_made_shown_and_defended(bbmoe, tmp_path) -> None:
    words = ("attack", *SMALL, *MODEL, "--output", tmp_path)
    code, out, _ = bbmoe(*words, width=120)
    assert code == 0 and "run folder" in out and "benign experts" in out
    code, out, _ = bbmoe(*words, "--json")
    [run] = json.loads(out)["runs"]
    assert code == 0 and run["metrics"].keys() >= {"asr", "twin_asr", "unsafe", "overall", "harm_share"}
    [folder] = tmp_path.glob("*-moe2-top-k-moevil-*")
    assert bbmoe("show", tmp_path)[0] == 0
    defend = ("defend", folder, "--defense", "fine-tuning", "--set", "epochs=1")
    code, out, _ = bbmoe(*defend, width=120)
    assert code == 0 and "fine-tuning" in out


def test_the_help_gives_the_defaults_of_a_mixture(bbmoe) -> None:
    """The values in the help are written by hand; those of a run are not."""
    code, out, _ = bbmoe("attack", "--help", width=200)
    spec = build_spec({"attack": "moevil"})
    assert code == 0 and spec.mixture is not None
    expected = {
        "splitter": spec.splitter.name,
        "gate": spec.gate.name,
        "experts": str(spec.mixture.experts),
        "poisoned-experts": ",".join(map(str, spec.mixture.poisoned_experts)),
        "policy": f"{spec.policy:g}",
    }
    text = re.sub(r"\s+", " ", out)
    for flag, value in expected.items():
        assert re.search(rf"--{flag} .*?\[([^]]*)\]", text)[1] == value


def test_info_shows_what_an_attack_on_experts_implies(bbmoe) -> None:
    code, out, _ = bbmoe("info", "attack", "moevil", width=100)
    assert code == 0 and "Default settings of a run with this attack:" in out
    shown = dict(
        line.strip().split("=", 1) for line in out.splitlines() if line.startswith("    ") and "=" in line
    )
    spec = build_spec({"attack": "moevil"})
    assert shown["model"] == spec.model.name == "convnext" and float(shown["policy"]) == spec.policy
    assert json.loads(shown["mixture"])["experts"] == spec.mixture.experts
    assert "unless others are given" not in bbmoe("info", "attack", "data-poisoning")[1]
    assert json.loads(bbmoe("info", "attack", "hsft", "--json")[1])["implies"]["gate"] == "top-k"
