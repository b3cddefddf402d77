"""`bbmoe audit`: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_spec

from backdoorbench_moe.auditing.checks import CHECKS
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.runner import run_attack

FAST = ("--checks", "gate-rows,head-rows,scaled-images,dormant-experts")


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Run:
    """A finished run of one epoch."""
    from tiny import Tiny

    from backdoorbench_moe import data

    data.registry.register("tiny")(Tiny)
    try:
        return run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path_factory.mktemp("runs"), twin=False)[
            0
        ]
    finally:
        data.registry.unregister("tiny")


@pytest.mark.slow
def test_it_prints_a_verdict_and_writes_two_files(bbmoe, victim) -> None:
    code, out, err = bbmoe("audit", victim.folder.path, *FAST)
    assert code == 0 and "check 1 of 4: gate-rows" in err
    # The limits of the thresholds stand beside the verdict, not at the end.
    assert out.splitlines()[1].startswith(("Thresholds: from 13 clean", "The images may not suit"))
    place = victim.folder.path / "audit"
    document = json.loads((place / "audit.json").read_text())
    assert document["verdict"]["level"] in out and "does not mean that a model is clean" in " ".join(
        out.split()
    )
    assert document["subject"]["images"] == 60 and document["subject"]["labels"]
    for name in ("audit.json", "report.html"):
        assert str(place / name) in out
    assert "dormant-experts: in every layer the experts select the patches" in " ".join(out.split())
    assert max(len(line) for line in out.splitlines() if str(place) not in line) <= 80
    # What the report says of the attack: nothing.
    text = json.dumps(document)
    assert "square" not in text.replace(victim.folder.path.name, "") and "trigger" not in text.replace(
        "triggers", ""
    )
    again = bbmoe("audit", victim.folder.path, *FAST, "--json", "--quiet")
    assert json.loads(again[1]) == document and again[2] == ""


@pytest.mark.slow
def test_images_of_a_folder_are_labelled_by_the_names_of_the_classes(bbmoe, victim, tmp_path) -> None:
    from PIL import Image
    from tiny import Tiny

    test = Tiny().load().test
    for number, (pixels, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        place = tmp_path / "images" / Tiny.names[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(place)
    words = (
        "audit",
        victim.folder.path,
        "--checks",
        "scaled-images",
        "--output",
        tmp_path / "a",
        "--json",
        "--quiet",
    )
    code, out, err = bbmoe(*words, "--images", tmp_path / "images")
    assert code == 0, err
    subject = json.loads(out)["subject"]
    assert subject["images"] == 60 and subject["accuracy"] == pytest.approx(victim.value("ba"))


@pytest.mark.slow
def test_weights_alone_and_the_exit_code(bbmoe, victim, tmp_path) -> None:
    code, out, _ = bbmoe("audit", victim.folder.path, "--no-images", "--output", tmp_path / "a", "--json")
    document = json.loads(out)
    assert code == 0 and document["subject"]["images"] == 0 and len(document["findings"]) == len(CHECKS)
    untested = {
        name for name, reason in document["not_tested"].items() if reason.startswith("no images were given")
    }
    assert {"inverted-image", "scaled-norms", "latent-clusters"} <= untested
    known = {
        "kind": "audit calibration", "schema_version": 1, "level": 0.05, "commit": "0", "population": {},
        "verdict": {"false_alarms": {"value": 0, "low": 0, "high": 10}},
        "checks": {"gate-rows/1": {"centre": -2.0, "threshold": -1.0, "clean": 9, "judges": True}},
    }  # fmt: skip
    known["population"] = {"calibrating": {"clean": 9}, "measuring": {"clean": 9}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(known))
    arguments = ("audit", victim.folder.path, "--no-images", "--checks", "gate-rows", "--calibration", file)
    code, out, _ = bbmoe(*arguments, "--output", tmp_path / "a", "--quiet")
    assert code == 0 and "signs of a backdoor" in out and "from 9 clean models" in " ".join(out.split())
    assert bbmoe(*arguments, "--output", tmp_path / "a", "--fail-on-signs", "--quiet")[0] == 1


@pytest.mark.slow
def test_a_later_call_loses_nothing(bbmoe, victim) -> None:
    run = victim.folder.path
    place = run / "audit"
    words = ("audit", run, "--json", "--quiet", "--checks")
    before = json.loads(bbmoe(*words, FAST[1])[1])
    found = json.loads(bbmoe(*words, "head-rows")[1])
    assert found == before == json.loads((place / "audit.json").read_text())
    shown = bbmoe("audit", run, "--checks", "head-rows", "--quiet")[1]
    assert "gate-rows" in shown and "Left out: expert-norms" in shown
    # Without images it is another audit, with a folder of its own.
    kept = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    code, out, err = bbmoe("audit", run, "--no-images", "--checks", "head-rows")
    assert code == 0 and f"{place} has the audit with other images" in err
    [own] = run.glob("audit-*")
    assert (
        str(own / "report.html") in out and len(json.loads((own / "audit.json").read_text())["findings"]) == 1
    )
    code, out, err = bbmoe("audit", run, "--no-images", "--checks", "head-rows", "--output", place, "--quiet")
    assert (code, out) == (2, "") and "--output: expected a folder without the audit of another" in err
    assert {file: file.read_bytes() for file in kept} == kept


@pytest.mark.slow
def test_a_budget_leaves_dear_checks_to_a_later_call(bbmoe, victim, tmp_path) -> None:
    words = (
        "audit",
        victim.folder.path,
        "--output",
        tmp_path / "out",
        "--checks",
        "gate-rows,scaled-images",
    )
    code, out, err = bbmoe(*words, "--budget", "0.000001s")
    assert code == 0 and "scaled-images: it would take about" in out and "of the budget of 0" in out
    assert "check 1 of 2: gate-rows" in err
    code, out, _ = bbmoe(*words, "--quiet")
    assert code == 0 and "it would take" not in out


@pytest.mark.slow
def test_bad_input_is_one_clear_line(bbmoe, victim, tmp_path) -> None:
    run = victim.folder.path
    (tmp_path / "mine.json").write_text("[]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for arguments, message in (
        ((tmp_path / "none",), "expected a folder with a record.json, found none"),
        ((run / "model.safetensors",), "got a file (bbmoe import turns weights into a run)"),
        ((run.parent,), f"it contains run folders, such as {run.name}"),
        ((run, "--images", tmp_path / "broken"), f"images: {tmp_path / 'broken' / 'a.png'}: cannot be read"),
        ((run, "--output", tmp_path / "mine.json"), "--output: expected a folder"),
        ((run, "--calibration", tmp_path / "mine.json"), "expected an audit calibration, got 'list'"),
        ((run, "--checks", "gate"), "did you mean 'gate-rows'"),
        ((run, "--checks", ","), "checks: expected names of checks"),
        ((run, "--budget", "soon"), "--budget: expected a time such as 90s, 9m or 1h30m, got 'soon'"),
        ((run, "--images", tmp_path / "none"), "expected a folder of images"),
        ((run, "--images", tmp_path, "--no-images"), "expected no --images"),
        ((run, "--calibration", tmp_path / "none.json"), "No such file"),
        ((run, "--base", tmp_path / "none"), "base: run folder"),
    ):
        code, out, err = bbmoe("audit", "--output", tmp_path / "out", *arguments, "--quiet")
        assert code == 2 and not out and message in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_refused(bbmoe, victim, tmp_path, monkeypatch) -> None:
    model = victim.model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    monkeypatch.setattr(Run, "model", lambda self: model)
    code, _, err = bbmoe("audit", victim.folder.path, "--output", tmp_path / "out", "--quiet")
    assert code == 2 and "model: head.weight has weights that are NaN or infinite" in err
