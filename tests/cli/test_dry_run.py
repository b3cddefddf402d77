"""`bbmoe attack --dry-run`: what it would make, how long it takes, and that nothing is written."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from safetensors.torch import save_file

from backdoorbench_moe.bench.running import estimate

SMALL = [
    *("--dataset", "tiny", "--recipe", "paper", "--epochs", "1", "--batch-size", "32", "--precision", "fp32"),
    *("--set", "model.widen_factor=1", "--set", "model.moe_channels=8", "--set", "model.expert_channels=4"),
    *("--poison-rate", "0.25"),
]  # fmt: skip


@pytest.fixture
def bbmoe(bbmoe, monkeypatch):
    """Run `bbmoe` on a wide terminal, with a short measurement."""
    monkeypatch.setattr(estimate, "SECONDS", 0.2)
    return functools.partial(bbmoe, width=200)


@pytest.mark.slow
def test_it_lists_what_the_attack_makes_and_writes_nothing(bbmoe, tmp_path) -> None:
    output = tmp_path / "runs"
    words = ["attack", *SMALL, "--trigger", "square", "--repeats", "2", "--output", output, "--quiet"]
    code, out, _ = bbmoe(*words, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and not output.exists()
    assert [run["status"] for run in plan["runs"]] == ["missing"] * 4
    assert all(run["seconds_left"] > 0 and run["total_epochs"] == 1 for run in plan["runs"])
    assert plan["seconds_left"] == pytest.approx(sum(run["seconds_left"] for run in plan["runs"]))
    assert bbmoe(*words)[0] == 0
    assert {run["run"] for run in plan["runs"]} == {folder.name for folder in output.iterdir()}
    code, out, _ = bbmoe(*words, "--dry-run")
    assert code == 0 and out.count("finished") == 5 and "4 runs, 4 finished; about 0 s left" in out


@pytest.mark.slow
def test_what_is_made_from_others_is_listed_after_them(bbmoe, tmp_path) -> None:
    tuned, pruned = "name: fine-tuning, epochs: 1", "name: fine-pruning, ratio: 0.5"
    defenses = f"defenses=[{{{tuned}, clean_fraction: 0.5}}, {{{pruned}, clean_fraction: 0.5}}]"
    words = ["attack", *SMALL, "--trigger", "square", "--output", tmp_path, "--quiet", "--set", defenses]
    code, out, err = bbmoe(*words, "--dry-run", "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    assert [run["total_epochs"] for run in runs] == [1, 1, 1, 5]  # Twin, victim, tuned, pruned.
    assert bbmoe(*words)[0] == 0
    assert {run["run"] for run in runs} == {folder.name for folder in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_surrogate_is_listed_like_a_twin(bbmoe, tmp_path) -> None:
    fast = ["--set", "trigger.steps=2", "--set", "trigger.batch_size=8", "--applicator", "image"]
    words = ["attack", *SMALL, "--trigger", "routing", *fast, "--output", tmp_path, "--quiet"]
    for surrogate, runs in (("same", 2), ("twin", 3)):
        code, out, err = bbmoe(*words, "--surrogate", surrogate, "--dry-run", "--json")
        assert code == 0, err
        assert len(json.loads(out)["runs"]) == runs
    code, out, err = bbmoe(*words, "--surrogate", "twin", "--no-twin", "--dry-run", "--json")
    assert len(planned := json.loads(out)["runs"]) == 2
    assert bbmoe(*words, "--surrogate", "twin", "--no-twin")[0] == 0
    assert {run["run"] for run in planned} == {folder.name for folder in tmp_path.iterdir()}
    code, out, err = bbmoe(*words, "--dry-run")
    assert (code, out) == (2, "") and "trigger 'routing': option 'surrogate' is required" in err
    code, out, err = bbmoe(*words, "--surrogate", "pmo", "--dry-run")
    assert (code, out) == (2, "") and "trigger.surrogate: unknown 'pmo'; did you mean 'pmoe'" in err


@pytest.mark.slow
def test_networks_that_are_trained_with_the_model_have_no_estimate(bbmoe, tmp_path) -> None:
    words = ["attack", *SMALL, "--attack", "training-control", "--output", tmp_path, "--dry-run"]
    code, out, err = bbmoe(*words, "--json")
    assert code == 0, err
    twin, attacked = json.loads(out)["runs"]
    assert twin["seconds_left"] > 0 and attacked["seconds_left"] is None
    _, out, _ = bbmoe(*words)
    assert "without 1 run of unknown time" in " ".join(out.split())
    _, out, _ = bbmoe(*words, "--trigger", "warp", "--json")
    assert all(run["seconds_left"] > 0 for run in json.loads(out)["runs"])


def test_without_a_twin_there_is_none(bbmoe, tmp_path) -> None:
    words = [
        "attack",
        *SMALL,
        "--trigger",
        "square",
        "--no-twin",
        "--output",
        tmp_path,
        "--dry-run",
        "--json",
    ]
    assert len(json.loads(bbmoe(*words)[1])["runs"]) == 1


def test_what_attack_would_refuse_is_refused(bbmoe, tmp_path) -> None:
    code, out, err = bbmoe("attack", *SMALL, "--dry-run", "--target", "3", "--output", tmp_path)
    assert (code, out) == (2, "") and "poison.target: expected a class in 0..2" in err


def test_a_missing_file_of_weights_is_the_error_that_the_attack_would_end_with(bbmoe, tmp_path) -> None:
    (tmp_path / "wrong.pth").write_text("no weights")
    for name, message in (("none.pth", "not found"), ("wrong.pth", "does not match its suffix")):
        file = tmp_path / name
        words = ["attack", *SMALL, "--trigger", "square", "--set", f"model.weights={file}", "--quiet"]
        words += ["--output", tmp_path / "runs"]
        found = bbmoe(*words, "--dry-run")
        assert found == bbmoe(*words)
        code, out, err = found
        assert (code, out) == (2, "") and err.startswith(f"bbmoe: error: weights {file}: {message}")
        assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_match_are_the_error_that_the_attack_would_end_with(bbmoe, tmp_path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    words = ["attack", *SMALL, "--trigger", "square", "--set", f"model.weights={file}", "--quiet"]
    words += ["--output", tmp_path / "runs"]
    found = bbmoe(*words, "--dry-run")
    assert found == bbmoe(*words)
    code, out, err = found
    assert (code, out) == (2, "") and err.startswith(f"bbmoe: error: weights {file}: do not match the model")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers: expected an integer from 1 to 1024, got 0"),
        (["--engine", "lokal"], "--engine: unknown 'lokal'; did you mean 'local'"),
        (["--address", "auto"], "--address: expected --engine ray with it, got 'auto'"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run: expected --engine ray with it, got 0.5"),
        (["--output", "file"], "--output: expected a folder, got 'file', where file is a file"),
    ],
)
def test_what_bench_run_would_refuse_is_refused(bbmoe, tmp_path, monkeypatch, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = bbmoe("bench", "run", "smoke", *flags, "--dry-run")
    assert (code, out) == (2, "") and message in err
