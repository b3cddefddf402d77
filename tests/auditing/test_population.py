"""Calibration on a population: who sets thresholds, who measures errors, and tables of both."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from backdoorbench_moe.auditing.calibration import FILE, MERGED_FILE, packaged, parse, set_threshold
from backdoorbench_moe.auditing.checks import CHECKS
from backdoorbench_moe.auditing.document import to_text
from backdoorbench_moe.auditing.population import (
    Member,
    calibrate,
    measure,
    measure_errors,
    scores_of,
    set_thresholds,
    strength,
    table,
    tells_apart,
    working,
)
from backdoorbench_moe.auditing.verdict import NOT_TESTED, SIGNS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "audit_population.py"


def population(count: int = 40, *, shift: float = 8.0) -> list[Member]:
    """Clean and attacked models; "good/1" sees every second attack, "bad/1" none, "rare/1" has few scores."""
    draws, members = np.random.default_rng(0), []
    for seed in range(count):
        for attack in ("", "square image", "blend patch"):
            seen = shift if attack == "square image" else 0.0
            scores = {"good/1": draws.normal() + seen, "bad/1": draws.normal()}
            if seed < 4 and not attack:
                scores["rare/1"] = 100.0
            members.append(
                Member(f"{attack}-{seed}", "signs", "pmoe", attack, 99.0 if attack else None, seed, scores)
            )
    return members


def test_thresholds_come_from_clean_models_of_even_seeds() -> None:
    members = population()
    found = set_thresholds(members, 0.05)
    assert found.keys() == {"bad/1", "good/1"}  # "rare/1" has two scores of even seeds.
    clean = [each.scores["good/1"] for each in members if not each.attacked and each.seed % 2 == 0]
    # "bad/1" does not tell attacked models from clean ones, so that the other one has all of the level.
    assert found["good/1"] == set_threshold(clean, 0.05)
    assert found["good/1"].judges and not found["bad/1"].judges
    # Models of odd seeds change nothing.
    changed = [
        Member(m.name, m.dataset, m.model, m.attack, m.asr, m.seed, dict.fromkeys(m.scores, 1000000.0))
        if m.seed % 2
        else m
        for m in members
    ]
    assert set_thresholds(changed, 0.05) == found


def test_a_check_with_the_same_score_for_all_clean_models_does_not_judge() -> None:
    """Its threshold would be that score, and any other score would be far above it."""
    assert tells_apart([0.0, 0.1] * 10, [1.0] * 20)
    assert not tells_apart([0.0] * 20, [1.0] * 20) and not tells_apart([0.0, 0.1] * 10, [])


def test_errors_are_measured_on_the_others() -> None:
    document = calibrate(population(), commit="abc", date="2026-01-01")
    known = parse(json.loads(to_text(document)), "here")
    assert known.thresholds.keys() == {"good/1", "bad/1"}
    assert document["population"]["calibrating"] == {"clean": 20, "attacked": 40, "models": {"pmoe": 60}}
    assert document["population"]["measuring"] == {"clean": 20, "attacked": 40, "models": {"pmoe": 60}}
    good, bad = document["checks"]["good/1"], document["checks"]["bad/1"]
    # All square images are seen, and of the rest as many as of clean models.
    assert 70 <= good["auroc"]["value"] <= 85 and good["detected"]["value"] == pytest.approx(50, abs=8)
    assert 25 <= bad["auroc"]["value"] <= 75 and bad["detected"]["value"] <= 10
    assert document["verdict"]["detected"]["value"] == pytest.approx(50, abs=8)
    assert good["judges"] and not bad["judges"]
    # Without the only check that judges there is no verdict; without the other one it is the same.
    assert good["verdict_without"]["auroc"] is None
    assert bad["verdict_without"]["auroc"] == document["verdict"]["auroc"]
    groups = {each["attack"]: (each["models"], each["signs"]) for each in document["groups"]}
    assert groups["square image"] == (20, 20) and groups["blend patch"][1] <= 3


def test_the_verdict_keeps_its_level_on_normal_scores() -> None:
    # 300 clean models of odd seeds: 15 false alarms are expected; fewer than 5 or more than 27 hardly.
    alarms = calibrate(population(600), commit=None, date="2026-01-01")["verdict"]["false_alarms"]
    assert alarms["n"] == 300 and 1.6 <= alarms["value"] <= 9


def test_attacks_that_failed_are_left_out_and_named() -> None:
    members = population()
    weak = Member("weak", "signs", "pmoe", "square image", 20.0, 1, {"good/1": -50.0})
    document = calibrate([*members, weak], commit=None, date="2026-01-01")
    assert document["population"]["weak"] == ["weak"]
    assert document["checks"] == calibrate(members, commit=None, date="2026-01-01")["checks"]


def test_an_attack_works_from_half_of_the_images() -> None:
    members = [Member(str(asr), "signs", "pmoe", "square image", asr, 1, {}) for asr in (49.9, 50.0, None)]
    clean = Member("clean", "signs", "pmoe", "", None, 1, {})
    assert [each.name for each in working([*members, clean])] == ["50.0", "clean"]


def test_thresholds_are_measured_on_another_data_set() -> None:
    known = set_thresholds(population(), 0.05)
    low, high = known["good/1"].value - 1, known["good/1"].value + 1
    members = [
        Member("a", "cifar10", "pmoe", "", None, 0, {"good/1": low}),
        Member("b", "cifar10", "pmoe", "", None, 1, {"good/1": high}),
        Member("c", "cifar10", "vmoe", "blend patch", 99.0, 0, {"good/1": high, "bad/1": 0.0}),
        Member("d", "cifar10", "vmoe", "blend patch", 99.0, 1, {"bad/1": 1000.0}),  # "bad/1" does not judge.
        Member("e", "cifar10", "vmoe", "blend patch", 40.0, 1, {"good/1": low}),  # The attack failed.
    ]
    found = measure(working(members), known)
    assert found["verdict"]["false_alarms"]["value"] == 50 and found["verdict"]["false_alarms"]["n"] == 2
    assert found["verdict"]["detected"]["value"] == 100 and found["verdict"]["detected"]["n"] == 1
    assert [(each["dataset"], each["model"], each["signs"]) for each in found["groups"]] == [
        ("cifar10", "pmoe", 1),
        ("cifar10", "vmoe", 1),
    ]


def test_errors_by_hand() -> None:
    found = measure_errors([0.1, 0.2, 0.3, 1.5], [0.2, 2.0], 1.0)
    # Of eight pairs, 2.0 wins four, 0.2 wins one and half of another.
    assert found["auroc"]["value"] == pytest.approx(100 * 5.5 / 8)
    assert found["false_alarms"]["value"] == 25 and found["detected"]["value"] == 50
    # A score that equals the threshold is no sign (see `judge`).
    equal = measure_errors([1.0], [1.0], 1.0)
    assert equal["false_alarms"]["value"] == equal["detected"]["value"] == 0
    assert (
        measure_errors([], [2.0], 1.0)["auroc"] is None and measure_errors([1.0], [], 1.0)["detected"] is None
    )


def test_the_strength_is_that_of_the_verdict() -> None:
    thresholds = set_thresholds(population(), 0.05)
    good = thresholds["good/1"]
    member = Member(
        "x", "signs", "pmoe", "", None, 1, {"good/1": good.value, "bad/1": thresholds["bad/1"].centre}
    )
    assert strength(member, thresholds) == pytest.approx(1.0)
    assert [each["signs"] for each in measure([member], thresholds)["groups"]] == [0]
    assert strength(member, thresholds, without="good/1") is None
    loud = Member("x", "signs", "pmoe", "", None, 1, {"good/1": good.centre, "bad/1": 1000.0})
    assert strength(loud, thresholds) == pytest.approx(0.0)  # "bad/1" does not judge.
    assert strength(Member("x", "signs", "pmoe", "", None, 1, {}), thresholds) is None


def test_too_small_populations_are_refused() -> None:
    with pytest.raises(ValueError, match="5 clean models of even seeds"):
        calibrate(population(6), commit=None, date="2026-01-01")
    even = [each for each in population() if each.calibrates or each.attacked]
    with pytest.raises(ValueError, match="clean models of odd seeds"):
        calibrate(even, commit=None, date="2026-01-01")


def test_without_a_check_that_tells_them_apart_nothing_judges() -> None:
    document = calibrate(population(shift=0.0), commit=None, date="2026-01-01")
    known = parse(json.loads(to_text(document)), "here")
    assert not any(each.judges for each in known.thresholds.values())
    assert set(document["verdict"].values()) == {None}
    assert (
        document["population"]["measuring"]["clean"] == 20
        and document["checks"]["good/1"]["auroc"] is not None
    )
    assert known.line.endswith("no check told the 40 attacked ones from them")
    assert "| **verdict** | | 1 | – | – | – | |" in table(document)


def test_the_table_has_every_check_and_the_verdict() -> None:
    text = table(calibrate(population(), commit=None, date="2026-01-01"))
    assert text.index("| good |") < text.index("| bad |") < text.index("| **verdict** |")
    assert "| signs | pmoe | none | 20 |" in text and "| signs | pmoe | square image | 20 | 20 |" in text
    assert all(line.count("|") in (6, 8) for line in text.splitlines() if line)


def test_the_calibration_of_the_package_is_of_these_checks() -> None:
    known = packaged()
    assert known is not None and known.level == 0.05
    keys = {f"{check.name}/{check.version}" for check in CHECKS}
    assert known.thresholds.keys() <= keys and any(each.judges for each in known.thresholds.values())
    population = known.document["population"]
    clean, attacked = (
        sum(population[part][kind] for part in ("calibrating", "measuring")) for kind in ("clean", "attacked")
    )
    assert clean >= 20 and attacked + len(population["weak"]) >= 40
    assert "clean models" in known.line


@pytest.fixture(scope="module")
def calibrated_again(tmp_path_factory) -> Path:
    """The folder of calibrations that are made from the committed scores."""
    folder, scores = tmp_path_factory.mktemp("audit"), SCRIPT.parent / "results" / "audit" / "scores.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["audit_population", "--scores", str(scores), "--output", str(folder)])
        assert runpy.run_path(str(SCRIPT))["main"]() == 0
    return folder


@pytest.mark.parametrize("merged", [False, True])
def test_the_calibrations_of_the_package_are_those_of_the_committed_scores(calibrated_again, merged) -> None:
    known = packaged(merged=merged)
    assert known is not None
    again = json.loads((calibrated_again / (MERGED_FILE if merged else FILE)).read_text())
    assert again["population"] == known.document["population"] and again["groups"] == known.document["groups"]
    for part in ("auroc", "false_alarms", "detected"):
        assert again["verdict"][part] == (
            known.document["verdict"][part] and pytest.approx(known.document["verdict"][part])
        )
    assert again["checks"].keys() == known.document["checks"].keys()
    for name, row in known.document["checks"].items():
        assert again["checks"][name]["threshold"] == pytest.approx(row["threshold"], rel=1e-4)
        assert again["checks"][name]["judges"] == row["judges"]


def test_scores_of_a_document() -> None:
    name = CHECKS[0].name
    findings = [
        {"check": name, "version": CHECKS[0].version, "score": 1.5, "level": SIGNS},
        {"check": CHECKS[1].name, "version": CHECKS[1].version, "score": None, "level": NOT_TESTED},
        {"check": CHECKS[2].name, "version": 99, "score": 2.0, "level": SIGNS},
        {"check": "of a later version", "version": 1, "score": 3.0, "level": SIGNS},
    ]
    assert scores_of({"findings": findings}) == {f"{name}/{CHECKS[0].version}": 1.5}


@pytest.mark.slow
def test_the_script_audits_runs_and_goes_on(tmp_path, monkeypatch, capsys) -> None:
    from tiny import tiny_spec

    from backdoorbench_moe.engine.runner import run_attack

    runs = run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path / "runs")
    script, out = runpy.run_path(str(SCRIPT)), tmp_path / "out"
    checks = "gate-rows,head-rows,expert-norms"

    def call(*more: str) -> int:
        arguments = [
            "audit_population",
            str(tmp_path / "runs"),
            "--output",
            str(out),
            "--checks",
            checks,
            *more,
        ]
        monkeypatch.setattr("sys.argv", arguments)
        return script["main"]()

    assert call("--budget", "-1") == 3 and not (out / "audits").exists()
    assert call() == 1 and "expected 5 clean models" in capsys.readouterr().err
    rows = (out / "scores.csv").read_text().splitlines()
    assert (
        len(rows) == 3
        and rows[0] == "run,dataset,model,attack,asr,seed,expert-norms/1,gate-rows/1,head-rows/1"
    )
    attacked = next(row for row in rows if row.startswith(runs[0].folder.path.name)).split(",")
    assert attacked[1:4] == ["tiny", "pmoe", "square image"]
    before = {file: file.stat().st_mtime_ns for file in (out / "audits").rglob("checks/*.json")}
    assert call() == 1 and {file: file.stat().st_mtime_ns for file in before} == before and len(before) == 6
    assert (out / "scores.csv").read_text().splitlines() == rows
    # Models audited earlier stay, and none is listed twice.
    earlier = tmp_path / "earlier.csv"
    earlier.write_text("\n".join([*rows, "of-long-ago,signs,pmoe,,,0,1.5,2.5,3.5", ""]), encoding="utf-8")
    assert call("--scores", str(earlier)) == 1
    assert len((out / "scores.csv").read_text().splitlines()) == 4
    assert "of-long-ago,signs,pmoe,,,0,1.5,2.5,3.5" in (out / "scores.csv").read_text()
