"""`bbmoe defend` with several defenses: which ones, in which order, and what becomes of those that fail."""

from __future__ import annotations

import csv
import functools
import io
import json
import shlex
import signal
from html import unescape

import pytest
from tiny import tiny_spec

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.running import estimate
from backdoorbench_moe.defenses.base import Defense
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack

SHARE = ("--set", "clean_fraction=0.5")


@pytest.fixture(scope="module")
def victim_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("victim")


@pytest.fixture
def victim(victim_folder) -> Run:
    """A finished run with its clean twin beside it."""
    return run_attack(tiny_spec(), output=victim_folder)[0]


@pytest.fixture
def bbmoe(bbmoe, monkeypatch):
    """Run `bbmoe` on a wide terminal, with a short measurement."""
    monkeypatch.setattr(estimate, "SECONDS", 0.1)
    return functools.partial(bbmoe, width=200)


class Broken(Defense):
    """Fails, and says before that it is the dearest."""

    def cost(self, model, *, held: int, train: int, classes: int, recipe) -> Cost:
        return Cost(predicted=1e6)

    def defend(self, task):
        raise ZeroDivisionError("a fault of its own")


class Silent(Defense):
    """Says nothing of its cost, and does nothing."""

    def defend(self, task):
        from backdoorbench_moe.defenses.base import DefenseResult

        return DefenseResult("idle", task.model)


class Interrupted(Broken):
    """Is interrupted, as by Ctrl-C."""

    def defend(self, task):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")


class Faulty(Silent):
    """Fails before it is applied, with an error that is not ours."""

    def check(self, model):
        raise KeyError("no such layer")


@pytest.fixture
def register():
    """Offer defenses in this process."""
    added = []

    def add(**parts):
        for name, part in parts.items():
            defenses.registry.register(name)(part)
            added.append(name)

    yield add
    for name in added:
        defenses.registry.unregister(name)


def runs(out: str) -> list[str]:
    return [run["spec"]["defenses"][-1]["name"] for run in json.loads(out)["runs"]]


@pytest.mark.slow
def test_a_list_is_made_dearest_last_and_found_again(bbmoe, victim, tmp_path) -> None:
    words = ["defend", victim.folder.path, "--defense", "strip,expert-reset", "--defense", "reroute"]
    words += [*SHARE, "--set", "strip.fpr=0.2", "--output", tmp_path]
    code, out, err = bbmoe(*words, "--json")
    assert code == 0, err
    # Plain tuning is added beside expert-reset; 4 experts, 48 images of which 16 are blended into every other.
    assert runs(out) == ["reroute", "fine-tuning", "expert-reset", "strip"]
    assert "defense 4 of 4: strip" in err and "about" in err
    assert {folder.name for folder in tmp_path.iterdir()} == {
        run["folder"].rpartition("/")[2] for run in json.loads(out)["runs"]
    }
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")}
    code, out, err = bbmoe(*words, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and "training" not in err and "about" not in err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("record.json")} == before
    assert [row["defenses"].partition(",")[0] for row in rows if row["metric"] == "asr"] == [
        "none", "reroute", "fine-tuning", "expert-reset", "strip"
    ]  # fmt: skip
    values = {(row["defenses"].partition(",")[0], row["metric"]): row["mean"] for row in rows}
    difference = float(values["expert-reset", "ba"]) - float(values["fine-tuning", "ba"])
    assert float(values["expert-reset", "ba_over_tuning"]) == pytest.approx(difference, abs=1e-5)
    assert values["none", "ra"] != "" and values["strip", "auroc"] != ""
    tables = {
        form: bbmoe(*words, "--quiet", "--format", form) for form in ("rich", "markdown", "latex", "html")
    }
    assert all(code == 0 and "expert-reset" in out for code, out, _ in tables.values())
    assert f"run folders: {tmp_path}" in tables["rich"][1]
    [again] = (line for line in unescape(tables["html"][1]).splitlines() if line.endswith("page.html"))
    assert shlex.split(again)[2:5] == [
        str(victim.folder.path), "--defense", "reroute,fine-tuning,expert-reset,strip"
    ]  # fmt: skip
    assert "suite" not in tables["markdown"][1]


@pytest.mark.slow
def test_all_are_all_that_fit_and_the_others_are_listed_with_the_reason(bbmoe, victim, tmp_path) -> None:
    words = ["defend", victim.folder.path, "--defense", "all", *SHARE, "--output", tmp_path, "--dry-run"]
    code, out, _ = bbmoe(*words, "--json")
    plan = json.loads(out)
    assert code == 0 and not list(tmp_path.iterdir())
    assert set(plan["not_applicable"]) >= {"align", "defensive-expert", "rasa"}
    assert plan["not_applicable"]["align"].startswith("model: expected a mixture")
    names = {
        name for name in defenses.registry.names() if any(f"-{name}-s0" in run["run"] for run in plan["runs"])
    }
    assert names | set(plan["not_applicable"]) == set(defenses.registry.names())
    code, out, _ = bbmoe(*words, "--json", "--skip", "anp,rnp", "--skip", "rasa")
    left = json.loads(out)
    assert code == 0 and "rasa" not in left["not_applicable"] and "align" in left["not_applicable"]
    skipped = {run["run"] for run in plan["runs"]} - {run["run"] for run in left["runs"]}
    assert len(skipped) == 2 and all("-anp-s0" in name or "-rnp-s0" in name for name in skipped)
    code, out, _ = bbmoe(*words)
    assert code == 0 and "not applicable: rasa: model: expected" in out and "one run at a time" in out


def test_a_fault_of_a_plug_in_is_a_reason_too(bbmoe, victim, register, tmp_path) -> None:
    register(faulty=Faulty)
    words = [
        "defend",
        victim.folder.path,
        "--defense",
        "faulty,reroute",
        *SHARE,
        "--output",
        tmp_path,
        "--dry-run",
    ]
    code, out, _ = bbmoe(*words, "--json")
    plan = json.loads(out)
    assert code == 0 and len(plan["runs"]) == 1
    assert plan["not_applicable"] == {"faulty": "KeyError: 'no such layer'"}


def test_too_few_images_for_plain_tuning_are_a_reason_too(bbmoe, tmp_path) -> None:
    """ABL holds no clean images; beside it, 5% of 48 images are fewer than there are classes."""
    few = tiny_spec(dataset={"name": "tiny", "train_images": 48})
    [run] = run_attack(few, output=tmp_path, twin=False)
    words = ["defend", run.folder.path, "--defense", "abl,reroute", *SHARE, "--set", "ratio=0.1", "--dry-run"]
    code, out, err = bbmoe(*words, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert len(plan["runs"]) == 2
    assert plan["not_applicable"] == {
        "fine-tuning beside abl": "clean_fraction: 0.05 of 48 images is 2; expected at least 3, as many as there are "
        "classes"
    }


def test_a_dense_model_keeps_what_does_not_need_experts(bbmoe, tmp_path) -> None:
    [dense] = run_attack(tiny_spec(model={"name": "vgg16_bn", "width": 4}), output=tmp_path, twin=False)
    words = ["defend", dense.folder.path, "--defense", "expert-drop,reroute,fine-tuning", *SHARE, "--dry-run"]
    code, out, _ = bbmoe(*words, "--json")
    plan = json.loads(out)
    assert code == 0 and [run["total_epochs"] for run in plan["runs"]] == [5]
    assert list(plan["not_applicable"]) == ["expert-drop", "reroute"]


@pytest.mark.slow
def test_one_that_fails_does_not_stop_the_others_and_is_tried_again(
    bbmoe, victim, register, tmp_path
) -> None:
    register(broken=Broken, silent=Silent)
    words = ["defend", victim.folder.path, "--defense", "silent,broken,reroute", *SHARE, "--output", tmp_path]
    code, out, err = bbmoe(*words, "--json")
    assert code == 1 and "Traceback" not in err
    assert runs(out) == ["reroute", "silent"], "the dearest that is known, then the one whose cost is not"
    assert json.loads(out)["failed"] == {"broken": "ZeroDivisionError: a fault of its own"}
    assert "defense 2 of 3: broken failed: ZeroDivisionError" in err and "not known" in err
    [failed] = tmp_path.glob("*-broken-*")
    assert json.loads((failed / "record.json").read_text())["status"] == "failed"
    code, out, err = bbmoe(*words)
    assert code == 1 and "failed: broken: ZeroDivisionError: a fault of its own" in out
    broken = Broken.defend
    try:
        Broken.defend = Silent.defend  # type: ignore[method-assign]
        code, out, _ = bbmoe(*words, "--json")
    finally:
        Broken.defend = broken  # type: ignore[method-assign]
    assert code == 0 and runs(out) == ["reroute", "broken", "silent"] and json.loads(out)["failed"] == {}


@pytest.mark.slow
def test_interrupted_in_the_middle_the_same_command_goes_on(
    bbmoe, victim, register, monkeypatch, tmp_path
) -> None:
    register(interrupted=Interrupted, silent=Silent)
    words = ["defend", victim.folder.path, "--defense", "silent,interrupted,reroute", *SHARE]
    words += ["--output", tmp_path, "--json"]
    # A shell starts programs in the background with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = bbmoe(*words)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (code, out) == (130, "") and "interrupted;" in err and "Traceback" not in err
    assert "defense 1 of 3: reroute" in err and "defense 2 of 3" not in err
    [made] = (file for file in tmp_path.rglob("record.json") if '"finished"' in file.read_text())
    assert "-reroute-" in made.parent.name
    before = made.stat().st_mtime_ns
    monkeypatch.setattr(Interrupted, "defend", Silent.defend)
    code, out, _ = bbmoe(*words)
    assert code == 0 and runs(out) == ["reroute", "interrupted", "silent"]
    assert made.stat().st_mtime_ns == before


def test_what_judges_training_images_has_its_rates_in_the_table(bbmoe, victim, tmp_path) -> None:
    words = ["defend", victim.folder.path, "--defense", "spectral,reroute", "--output", tmp_path, "--quiet"]
    words += [*SHARE, "--set", "spectral.epsilon=0.2", "--set", "spectral.retrain=false"]
    code, out, err = bbmoe(*words, "--format", "csv")
    assert code == 0, err
    [folder] = tmp_path.glob("*-spectral-*")
    metrics = json.loads((folder / "record.json").read_text())["metrics"]
    rows = list(csv.DictReader(io.StringIO(out)))
    found = {row["metric"]: row["mean"] for row in rows if row["defenses"].startswith("spectral")}
    for name in ("sample_auroc", "sample_tpr", "sample_fpr"):
        assert float(found[name]) == pytest.approx(metrics[name]["value"], abs=1e-5)
    assert not {"auroc", "tpr", "fpr", "class_tpr", "class_fpr"} & {row["metric"] for row in rows}


def test_an_option_goes_to_the_one_or_to_all_that_have_it(bbmoe, victim, tmp_path) -> None:
    words = [
        "defend",
        victim.folder.path,
        "--defense",
        "fine-tuning,reroute",
        "--output",
        tmp_path,
        "--quiet",
    ]
    given = [
        "--set",
        "epochs=1",
        *SHARE,
        "--set",
        "reroute.threshold=0.9",
        "--set",
        "reroute.clean_fraction=0.25",
    ]
    code, out, err = bbmoe(*words, *given, "--json")
    assert code == 0, err
    parts = {
        run["spec"]["defenses"][0]["name"]: run["spec"]["defenses"][0] for run in json.loads(out)["runs"]
    }
    assert parts == {
        "fine-tuning": {"name": "fine-tuning", "epochs": 1, "clean_fraction": 0.5},
        "reroute": {"name": "reroute", "threshold": 0.9, "clean_fraction": 0.25},
    }


BAD = {
    "unknown": (["--defense", "strip,re-route"], "defense: unknown 're-route'; did you mean 'reroute'"),
    "empty": (["--defense", "strip,"], "--defense: expected names such as strip or strip,reroute, got 'strip,'"),
    "skips an unknown one": (
        ["--defense", "all", "--skip", "re-route"],
        "defense: unknown 're-route'; did you mean 'reroute'",
    ),
    "skips all but one": (
        ["--defense", "strip,reroute", "--skip", "reroute", "--set", "strip.blend_s=1"],
        "option: unknown 'blend_s'; did you mean 'blends'",
    ),
    "skips nothing": (["--defense", "all", "--skip", ""], "--skip: expected names such as strip or strip,reroute"),
    "skips all": (
        ["--defense", "strip", "--skip", "strip"],
        "--skip: expected at least one defense to be left, got 'strip'",
    ),
    "none fits": (
        ["--defense", "align,rasa"],
        "--defense: cannot be applied to {run}: align: model: expected a mixture of merged experts, got PMoE; rasa: ",
    ),
    "option of none": (["--defense", "strip,reroute", "--set", "ratio=1"], "--set: defense or option: unknown 'ratio'"),
    "no such option": (
        ["--defense", "strip,reroute", "--set", "strip.blend_s=1"],
        "option: unknown 'blend_s'; did you mean 'blends'",
    ),
    "not listed": (
        ["--defense", "strip,reroute", "--set", "rasa.epochs=1"],
        "--set: expected a defense chosen with --defense (strip, reroute) before the first dot, got 'rasa'",
    ),
    "not chosen": (["--defense", "strip", "--set", "rasa.epochs=1"], "(strip) before the first dot, got 'rasa'"),
    "of its own": (["--defense", "strip", "--set", "strip.blend_s=1"], "'strip': option: unknown 'blend_s'"),
    "no option": (["--defense", "strip,reroute", "--set", "strip=1"], "--set: expected strip.OPTION=VALUE"),
    "out of range": (["--defense", "all", "--set", "reroute.threshold=2"], "defense 'reroute': threshold: expected"),
    "format": (["--defense", "all", "--format", "pdf"], "Invalid value for '--format'"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_clear_line_before_anything_is_made(bbmoe, victim, tmp_path, args, message) -> None:
    code, out, err = bbmoe("defend", victim.folder.path, "--quiet", *args, "--output", tmp_path / "runs")
    assert (
        (code, out) == (2, "")
        and message.replace("{run}", victim.folder.path.name) in err
        and "Traceback" not in err
    )
    assert "Usage" in err or err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
