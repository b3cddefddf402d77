"""Whole audits: resumed, saved, drawn, and from Python."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from planted_models import row_images
from subjects import Constant, Rows, merged, small_pmoe
from toy_texts import ToyModel

import backdoorbench_moe as bbmoe
from backdoorbench_moe.auditing import opening
from backdoorbench_moe.auditing.audit import Audit, cost_of, digest_of, run_audit
from backdoorbench_moe.auditing.calibration import Calibration, Threshold, packaged
from backdoorbench_moe.auditing.checks import CHECKS, find_checks
from backdoorbench_moe.auditing.document import as_document
from backdoorbench_moe.auditing.opening import with_store
from backdoorbench_moe.auditing.place import check_place, place_in_run
from backdoorbench_moe.auditing.subject import make_subject
from backdoorbench_moe.auditing.verdict import DOES_NOT_JUDGE, NO_SIGN, NOT_TESTED, SIGNS
from backdoorbench_moe.engine.opening.given_images import take_images
from backdoorbench_moe.errors import BbmoeError, ConfigError, DataError, RecordError, ShapeError
from backdoorbench_moe.moe.layers import TopKRouter
from backdoorbench_moe.moe.merging import MergedModel


@pytest.fixture
def uncalibrated(monkeypatch) -> None:
    """As if the package had no calibration."""
    monkeypatch.setattr("backdoorbench_moe.auditing.audit.packaged", lambda **_: None)


FAST = ["gate-rows", "expert-norms", "head-rows", "scaled-images"]


def audit(
    *checks: Constant, folder=None, name: str = "a model", calibrated: bool = False, **given: object
) -> Audit:
    subject, store = with_store(make_subject(Rows(), **given), folder)  # type: ignore[arg-type]
    return run_audit(subject, name=name, store=store, checks=checks, calibrated=calibrated)


def test_a_check_that_is_finished_is_not_run_again(tmp_path) -> None:
    checks = [Constant("one", 2.0), Constant("two", 0.5), Constant("none", None)]
    first = audit(*checks, folder=tmp_path)
    again = audit(*checks, folder=tmp_path)
    assert [check.runs for check in checks] == [1, 1, 2]
    assert first.verdict == again.verdict and first.seconds == again.seconds > 0
    assert again.findings[0].details == {"runs": 1, "bad": None}
    # Another model, another version of a check, and a damaged file are no results.
    audit(*checks, folder=tmp_path, image_size=8)
    checks[0].version = 2
    (tmp_path / "checks" / "two.json").write_text("[]")
    audit(*checks, folder=tmp_path, image_size=8)
    assert [check.runs for check in checks] == [3, 3, 4]


def test_an_audit_of_fewer_checks_keeps_what_others_found(tmp_path, monkeypatch) -> None:
    one, two, none, last = (
        Constant("one", 2.0),
        Constant("two", 0.5),
        Constant("none", None),
        Constant("last", 9),
    )
    monkeypatch.setattr("backdoorbench_moe.auditing.audit.CHECKS", (one, two, none, last))
    first = audit(one, two, none, folder=tmp_path)
    assert first.left_out == ("last",)
    narrower = audit(two, folder=tmp_path)
    assert as_document(narrower)["findings"] == as_document(first)["findings"]
    assert narrower.verdict == first.verdict
    assert narrower.left_out == ("last",) and narrower.facts["cost"] == first.facts["cost"]
    assert [check.runs for check in (one, two, none, last)] == [1, 1, 1, 0]
    # A check whose version was raised since is no result any more, and other images are another audit.
    one.version = 2
    assert audit(two, folder=tmp_path).left_out == ("one", "last")
    alone = audit(two, folder=tmp_path, image_size=8)
    assert [each.check for each in alone.findings] == ["two"] and alone.verdict.level == NO_SIGN


def test_what_was_measured_but_does_not_judge_is_not_untested(tmp_path, uncalibrated) -> None:
    found = audit(Constant("judges", 0.5), Constant("measured", 7.0, None), Constant("neither", None))
    assert [each.level for each in found.findings] == [NO_SIGN, DOES_NOT_JUDGE, NOT_TESTED]
    assert found.verdict.level == NO_SIGN and found.reasons == ["judges measured 0.5"]
    assert [each.check for each in found.untested] == ["neither"]
    assert [each.check for each in found.unjudged] == ["measured"]
    files = found.save(tmp_path)
    document = json.loads(files[0].read_text())
    assert document["not_tested"] == {"neither": "nothing to see"}
    assert list(document["does_not_judge"]) == ["measured"]
    assert "no threshold" in document["does_not_judge"]["measured"]
    parts = re.split(r"<h2[^>]*>", files[1].read_text(encoding="utf-8"))
    [untested] = [part for part in parts if part.startswith("Not tested")]
    [unjudged] = [part for part in parts if part.startswith("Measured, but does not judge")]
    [table] = [part for part in parts if part.startswith("Checks")]
    assert "nothing to see" in untested and "measured 7" not in untested
    assert "measured measured 7" in unjudged and "nothing to see" not in unjudged
    assert "7.00" in table and "does not judge" in table and 'class="outside"' not in table


def test_a_check_that_does_not_judge_is_named_if_it_is_above_its_threshold(tmp_path, monkeypatch) -> None:
    row = {"centre": 0.0, "threshold": 2.0, "clean": 9, "judges": False}
    monkeypatch.setattr(
        "backdoorbench_moe.auditing.audit.packaged",
        lambda **_: Calibration(
            0.05,
            {
                "far/1": Threshold(0.0, 2.0, 9, judges=False),
                "near/1": Threshold(0.0, 2.0, 9, judges=False),
                "judges/1": Threshold(0.0, 2.0, 9),
            },
            {
                "checks": {"far/1": row, "near/1": row},
                "population": {"calibrating": {"clean": 9}, "measuring": {"clean": 8}},
                "verdict": {"false_alarms": {"value": 0, "low": 0, "high": 30}},
                "groups": [
                    {"dataset": "signs", "model": "pmoe"},
                    {"dataset": "cifar10", "model": "pmoe"},
                    {"dataset": "cifar10", "model": "vmoe"},
                ],
            },
        ),
    )
    found = audit(Constant("far", 9.0), Constant("near", 1.0), Constant("judges", 0.5), calibrated=True)
    files = found.save(tmp_path)
    document, page = json.loads(files[0].read_text()), files[1].read_text(encoding="utf-8")
    assert found.verdict.level == NO_SIGN and document["above_but_does_not_judge"] == ["far"]
    line = "Above the threshold, but not counted for the verdict: far (9.00; threshold 2.00)."
    assert line in page and page.index(line) < page.index("Not tested")
    assert "the calibration did not show" in document["does_not_judge"]["near"]
    assert (
        "from 9 clean models (pmoe on signs; pmoe, vmoe on cifar10; others were not measured); on 8 other clean ones"
        in page
    )
    # Without such a check, nothing is said.
    assert "Above the threshold" not in audit(Constant("near", 1.0), calibrated=True).save(tmp_path)[
        1
    ].read_text(encoding="utf-8")


def test_an_audit_that_only_measures_says_so(tmp_path, uncalibrated) -> None:
    found = audit(Constant("measured", 7.0, None))
    page = found.save(tmp_path)[1].read_text(encoding="utf-8")
    assert found.verdict.level == NOT_TESTED and "No check that was run judges" in page
    assert "Nothing could be tested" not in page


def test_checks_that_were_left_out_are_named(tmp_path, monkeypatch) -> None:
    one, two = Constant("one", 2.0), Constant("two", 0.5)
    monkeypatch.setattr("backdoorbench_moe.auditing.audit.CHECKS", (one, two))
    files = audit(one).save(tmp_path)
    assert json.loads(files[0].read_text())["left_out"] == ["two"]
    page = files[1].read_text(encoding="utf-8")
    assert "Left out: two." in page and "All checks were run" not in page
    page = audit(one, two).save(tmp_path)[1].read_text(encoding="utf-8")
    assert "Left out" not in page and "All checks were run" in page


def test_two_subjects_have_two_folders(tmp_path) -> None:
    usual, model = tmp_path / "audit", Rows()
    one, other = (digest_of(make_subject(model, image_size=size)) for size in (None, 8))
    assert place_in_run(tmp_path, one) == usual
    audit(Constant("one", 2.0), folder=usual)
    assert place_in_run(tmp_path, one) == usual
    assert place_in_run(tmp_path, other) == tmp_path / f"audit-{other[:8]}"
    check_place(usual, one, "output")
    with pytest.raises(ConfigError, match="output: expected a folder without the audit of another model"):
        check_place(usual, other, "output")


def test_from_python_another_audit_is_not_overwritten(tmp_path) -> None:
    bbmoe.audit(Rows(), checks=["head-rows"], output=tmp_path)
    bbmoe.audit(Rows(), checks=["channel-norms"], image_size=8, output=tmp_path / "other")
    before = (tmp_path / "audit.json").read_bytes()
    with pytest.raises(ConfigError, match="output: expected a folder without"):
        bbmoe.audit(Rows(), checks=["head-rows"], image_size=8, output=tmp_path)
    assert (tmp_path / "audit.json").read_bytes() == before
    again = bbmoe.audit(Rows(), checks=["channel-norms"], output=tmp_path)
    assert {each.check for each in again.findings} == {"head-rows", "channel-norms"}
    with pytest.raises(ConfigError, match="output: expected a folder, got"):
        bbmoe.audit(Rows(), checks=["head-rows"], output=tmp_path / "audit.json" / "x")


def test_an_interrupted_audit_goes_on(tmp_path) -> None:
    class Stop(Constant):
        def measure(self, subject):
            raise KeyboardInterrupt

    one = Constant("one", 2.0)
    with pytest.raises(KeyboardInterrupt):
        audit(one, Stop("two", 1.0), folder=tmp_path)
    assert audit(one, Constant("two", 0.1), folder=tmp_path).verdict.level == SIGNS and one.runs == 1


def test_a_threshold_is_applied_to_what_was_measured_before(tmp_path) -> None:
    check = Constant("one", 2.0)
    assert audit(check, folder=tmp_path).verdict.level == SIGNS
    check.threshold = 3.0
    assert audit(check, folder=tmp_path).verdict.level == NO_SIGN and check.runs == 1


def test_files_hold_what_was_found(tmp_path, uncalibrated) -> None:
    found = audit(
        Constant("one", 2.0),
        Constant("<b>two</b>", 0.5),
        Constant("three", None),
        name="<script>alert(1)</script>",
    )
    files = found.save(tmp_path / "new" / "place")
    document = json.loads(files[0].read_text())
    assert document["kind"] == "audit" and document["verdict"]["level"] == SIGNS
    assert document["reasons"] == ["one measured 2"] == found.reasons
    assert document["not_tested"] == {"three": "nothing to see"}
    assert [each["level"] for each in document["findings"]] == [SIGNS, NO_SIGN, NOT_TESTED]
    assert document["findings"][0]["details"]["bad"] is None and document["calibration"] is None
    assert "not calibrated" in document["thresholds"]
    page = files[1].read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>two" not in page
    assert "Signs of a backdoor (not calibrated)" in page and "nothing to see" in page


def test_the_page_begins_with_the_verdict_and_loads_nothing(tmp_path) -> None:
    page = audit(Constant("one", 2.0), Constant("two", 3.0), Constant("x", 4.0), Constant("y", 5.0)).save(
        tmp_path
    )[1]
    text = page.read_text(encoding="utf-8")
    places = [
        text.index(part)
        for part in ("Signs of a backdoor", "The three strongest", "Not tested", "Checks</h2>")
    ]
    assert places == sorted(places)
    assert text.index("y measured 5") < text.index("x measured 4") < text.index("two measured 3")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "://" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_nothing_tested_is_said(tmp_path) -> None:
    found = audit(Constant("one", None))
    assert (found.verdict.level, found.reasons) == (NOT_TESTED, [])
    assert "Nothing could be tested" in found.save(tmp_path)[1].read_text(encoding="utf-8")


def test_a_module_from_python(tmp_path, uncalibrated) -> None:
    split, model = row_images(40), Rows().train()
    found = bbmoe.audit(
        model, images=split.images, labels=split.labels.tolist(), checks=FAST, output=tmp_path
    )
    assert found.verdict.level == NO_SIGN and model.training
    assert found.facts["accuracy"] == 100 and found.facts["images"] == 40 and found.facts["classes"] == 6
    assert {each.check: each.level for each in found.findings}["expert-norms"] == NOT_TESTED
    assert json.loads((tmp_path / "audit.json").read_text())["name"] == "Rows"
    assert (tmp_path / "report.html").is_file()
    alone = bbmoe.audit(small_pmoe(), checks=FAST)
    assert alone.facts["images"] == 0 and {each.check for each in alone.untested} == {"scaled-images"}
    assert "no images were given" in alone.untested[0].reason


def test_a_module_with_extra_state_that_is_no_tensor() -> None:
    class Extra(Rows):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    found = bbmoe.audit(Extra(), base=Extra(), checks=["head-rows"])
    assert found.verdict.level == NO_SIGN and found.facts["base"]


def test_of_a_language_model_the_weights_are_tested() -> None:
    """It is routed but has no patches, so that the size of its images is not known."""
    dense = ToyModel(vocabulary=19, context=16, padding=0, features=8, layers=1)
    model = MergedModel(dense, 4, lambda d, e: TopKRouter(d, e, top_k=1, gate_std=1.0))
    found = {each.check: each for each in bbmoe.audit(model).findings}
    assert found["gate-rows"].score is not None and found["largest-margin"].level == NOT_TESTED
    assert "the size of its images is not known" in found["largest-margin"].reason


def test_importing_the_parts_does_not_hide_the_function() -> None:
    import backdoorbench_moe.auditing.audit  # noqa: F401

    assert callable(bbmoe.audit)


def test_images_of_a_folder(tmp_path) -> None:
    split = row_images(30)
    for number, image in enumerate(split.images):
        place = tmp_path / "images" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:02}.png")
    found, labels = take_images(tmp_path / "images", size=None)
    assert labels is None
    assert sorted(map(str, found.flatten(1).tolist())) == sorted(map(str, split.images.flatten(1).tolist()))
    assert take_images(tmp_path / "images", size=4)[0].shape == (30, 3, 4, 4)
    drawn, labels = take_images(tmp_path / "images", size=None, classes=("0", "1"), most=8)
    rows = {str(image.flatten().tolist()): number for number, image in enumerate(split.images)}
    assert [rows[str(image.flatten().tolist())] % 2 for image in drawn] == labels.tolist()
    assert len(drawn) == 8 and {0, 1} == set(labels.tolist())
    one = bbmoe.audit(Rows(), images=tmp_path / "images", checks=["scaled-images"])
    assert one.facts["images"] == 30 and one.facts["accuracy"] is None
    with pytest.raises(ConfigError, match="labels: expected none for a folder of images"):
        bbmoe.audit(Rows(), images=tmp_path / "images", labels=[0] * 30, checks=["scaled-images"])
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "found none in"), (tmp_path / "none", "expected a folder")):
        with pytest.raises(DataError, match=message):
            bbmoe.audit(Rows(), images=path)


def test_labels_of_a_run_are_refused_without_images(monkeypatch) -> None:
    opened = SimpleNamespace(
        model=Rows(), image_size=8, classes=(), device=torch.device("cpu"), precision="fp32"
    )
    monkeypatch.setattr(opening, "open_model", lambda *_, **__: opened)
    own = row_images(30)
    monkeypatch.setattr(opening, "_run_images", lambda *_: (own, [], []))
    assert len(opening.open_run_subject("a run").images) == 30
    for given in ({}, {"with_images": False}):
        with pytest.raises(ConfigError, match="labels: expected images with the labels, got none"):
            opening.open_run_subject("a run", labels=[0] * 30, **given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"checks": ["gates"]}, ConfigError, "checks: unknown 'gates'"),
        ({"base": 7}, ConfigError, "base: expected a run, its folder, a module or a state dict"),
        (
            {"base": {"model": {}, "epoch": 3}},
            ConfigError,
            r"base: expected a state dict, .* got \"?a mapping with the keys \['model', 'epoch'\]",
        ),
        ({"base": "nowhere"}, RecordError, "base: run folder nowhere: expected a folder"),
        ({"images": torch.full((30, 3, 8, 8), 2.0)}, ShapeError, r"images: expected floats in \[0, 1\]"),
        ({"images": torch.zeros(30, 3, 8, 9)}, ShapeError, r"images: expected shape \(N, 3, S, S\)"),
        ({"images": [["a"]]}, ShapeError, r"images: expected shape \(N, 3, S, S\), got list"),
        ({"labels": [0.5] * 40, "images": row_images(40).images}, ShapeError, "labels: expected 40 integers"),
        ({"labels": [0] * 40}, ConfigError, "labels: expected images"),
        ({"tasks": [torch.zeros(3)]}, ShapeError, r"tasks\[0\]: expected shape"),
    ],
)
def test_what_python_refuses(given, error, message) -> None:
    with pytest.raises(error, match=message):
        bbmoe.audit(Rows(), **given)
    assert issubclass(error, BbmoeError)


def test_the_cost_counts_what_can_be_tested() -> None:
    subject = make_subject(Rows(), images=row_images(40).images)
    chosen = find_checks(["scaled-images", "task-latents", "gate-rows"])
    assert cost_of(subject, chosen).predicted == 5 * 40
    assert cost_of(make_subject(Rows()), CHECKS).trained == 0


def test_mixtures_are_compared_with_mixtures() -> None:
    mixture, _ = merged()
    others, own = packaged(), packaged(merged=True)
    for model, calibration in ((mixture, own), (small_pmoe(), others)):
        found = bbmoe.audit(model, checks=["expert-norms"])
        assert found.calibration is not None and calibration is not None
        assert found.calibration.document == calibration.document
    assert found.calibration.document["groups"][0]["model"] != "merged"
