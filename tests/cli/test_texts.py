"""`bbmoe attack` on texts: the command, its table, and how long it will take."""

from __future__ import annotations

import json
import shlex

import pytest
from toy_texts import Toy, ToyModel

from backdoorbench_moe import data, models
from backdoorbench_moe.bench.running import estimate

COMMAND = shlex.split(
    "attack --attack hsft --dataset toy --experts 2 --poisoned-experts 0 --set dataset.texts=48 "
    "--set mixture.gate_images=16 --set mixture.expert_train.epochs=1 --set mixture.gate_train.epochs=1 "
    "--set attack.epochs=1 --set policy=0.25 --epochs 1 --precision fp32 --threads 1 --quiet"
)


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    """The toy language and its model by name, an empty folder to work in, and a short measurement of the speed."""
    data.registry.register("toy")(Toy)
    models.registry.register("toy-model")(ToyModel)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "SECONDS", 0.05)
    yield
    data.registry.unregister("toy")
    models.registry.unregister("toy-model")


def test_the_table_names_texts_and_queries(bbmoe) -> None:
    code, out, err = bbmoe(*COMMAND, width=100)
    assert code == 0, err
    for words in (
        "answered harmfully (H)",
        "not refused",
        "correct answers (BA)",
        "texts",
        "harmful",
        "copy, poisoned",
    ):
        assert words in out
    assert "image" not in out and "trigger" not in out
    # The run that `show` prints again.
    code, out, _ = bbmoe("show", "runs", width=200)
    assert code == 0 and "hsft" in out


def test_json_has_the_data(bbmoe) -> None:
    _, out, _ = bbmoe(*COMMAND, "--no-twin", "--json")
    [run] = json.loads(out)["runs"]
    assert run["data"]["vocabulary"] == 19 and run["metrics"]["asr"]["n"] == 40


def test_the_runs_and_their_time_are_said_before(bbmoe) -> None:
    code, out, err = bbmoe(*COMMAND, "--dry-run", "--json")
    assert code == 0, err
    assert len(json.loads(out)["runs"]) == 6


@pytest.fixture
def run(bbmoe, tmp_path) -> str:
    """The folder of an attacked mixture."""
    code, _, err = bbmoe(*COMMAND)
    assert code == 0, err
    [path] = (tmp_path / "runs").glob("*-moe2-top-k-hsft-*")
    return str(path)


@pytest.mark.slow
def test_all_defenses_of_a_run_on_texts_are_those_that_take_texts(bbmoe, run) -> None:
    shared = ["--set", "epochs=1", "--set", "clean_fraction=0.25", "--quiet", "--json"]
    code, out, err = bbmoe("defend", run, "--defense", "all", "--dry-run", *shared)
    assert code == 0, err
    planned = json.loads(out)
    names = {"align", "defensive-expert", "fine-tuning", "rasa", "router-reset"}
    assert len(planned["runs"]) == len(names) and planned["not_applicable"] == {}
    assert all(any(f"-{name}-" in each["run"] for each in planned["runs"]) for name in names)
    code, out, err = bbmoe("defend", run, "--defense", "rasa,align,strip", *shared)
    assert code == 0, err
    found = json.loads(out)
    made = {each["spec"]["defenses"][0]["name"] for each in found["runs"]}
    assert made == {"align", "rasa"}
    assert found["not_applicable"] == {
        "strip": "model: this defense is for images, and MergedModel takes texts"
    }
    code, out, err = bbmoe("defend", run, "--defense", "align", *shared[:-1], width=100)
    assert code == 0 and "refused queries not answered safely, %: before" in out and "image" not in out


@pytest.mark.slow
def test_an_analysis_of_a_run_on_texts(bbmoe, run) -> None:
    code, out, err = bbmoe("analyze", run, "--quiet", "--threads", "1", width=100)
    assert code == 0, err
    for words in (
        "80 test queries, 40 harmful",
        "cosine with the latents of task 0: harmful queries",
        "expert 0 muted",
        "expert 0, mean output",
        "example answers",
        "no patch maps, routing, capture, shift, pixels: the data are texts",
    ):
        assert words in " ".join(out.split())
    code, out, err = bbmoe("analyze", run, "--images", "1", "--quiet")
    assert code == 2 and not out and "images: expected none, as the data are texts" in err


def test_a_part_that_only_images_have_is_refused_in_one_line(bbmoe) -> None:
    code, out, err = bbmoe(*COMMAND, "--trigger", "square", "--applicator", "image")
    assert code == 2 and not out
    assert "trigger: expected none, as the data are texts, got 'square'" in err.replace("\n", " ")
