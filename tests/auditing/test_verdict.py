"""Levels, strengths and the verdict; thresholds from a population."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import norm, t
from subjects import Constant

from backdoorbench_moe.auditing import calibration
from backdoorbench_moe.auditing.calibration import Calibration, Threshold, parse, set_threshold
from backdoorbench_moe.auditing.check import Measured
from backdoorbench_moe.auditing.verdict import (
    DOES_NOT_JUDGE,
    NO_SIGN,
    NOT_TESTED,
    SIGNS,
    combine,
    judge,
    not_tested,
    strongest,
)
from backdoorbench_moe.errors import RecordError

CHECK = {"centre": 1.0, "threshold": 3.0, "clean": 10, "judges": True}
DOCUMENT = {
    "kind": "audit calibration",
    "schema_version": 1,
    "level": 0.05,
    "population": {"calibrating": {"clean": 10}, "measuring": {"clean": 12}},
    "verdict": {"false_alarms": {"value": 8.3, "low": 1.5, "high": 35.4}},
    "checks": {"a/1": CHECK},
}


def found(score: float, name: str = "a", threshold: float | None = 1.0, known: Calibration | None = None):
    return judge(Constant(name, score, threshold), Measured(score, f"{name} is {score:g}"), known)


def test_a_score_above_the_threshold_is_a_sign() -> None:
    assert found(1.01).level == SIGNS and found(1.0).level == NO_SIGN and found(-5.0).level == NO_SIGN
    assert found(0.5).strength == 0.5 and not found(0.5).calibrated


def test_a_calibrated_threshold_takes_the_place_of_the_published_one() -> None:
    known = parse(DOCUMENT, "here")
    one = found(2.0, known=known)
    assert one.level == NO_SIGN and one.calibrated and one.threshold == 3.0 and one.strength == 0.5
    assert "10 clean models" in known.line and "8%" in known.line and "2 to 35%" in known.line


def test_a_check_that_is_not_in_the_calibration_does_not_judge() -> None:
    """Otherwise, the false alarm rate that was measured for the verdict would not include it."""
    known = parse(DOCUMENT, "here")
    newer = Constant("a", 2.0)
    newer.version = 2
    for one in (found(2.0, "b", known=known), judge(newer, Measured(2.0, "x"), known)):
        assert one.level == DOES_NOT_JUDGE and one.threshold == 1.0 and not one.calibrated
        assert one.why_not == "the calibration has no threshold for the check"
    assert combine([found(2.0, "b", known=known), found(2.0, known=known)]).level == NO_SIGN


def test_a_check_that_did_not_earn_its_place_does_not_judge() -> None:
    row = DOCUMENT["checks"]["a/1"]
    one = found(99.0, known=parse({**DOCUMENT, "checks": {"a/1": {**row, "judges": False}}}, "here"))
    assert one.level == DOES_NOT_JUDGE and one.score == 99.0 and one.reason == "a is 99"
    assert "the calibration did not show" in one.why_not and not found(1.0).why_not
    assert combine([one]).level == NOT_TESTED and strongest([one]) == []


def test_without_a_threshold_nothing_is_judged() -> None:
    one = found(9.0, threshold=None)
    assert one.level == DOES_NOT_JUDGE and one.score == 9.0 and one.strength is None
    assert "no threshold" in one.why_not and one.reason == "a is 9"


def test_the_verdict_is_never_clean() -> None:
    nothing = not_tested(Constant("c", None), "no images were given")
    assert combine([]).level == combine([nothing, found(9.0, threshold=None)]).level == NOT_TESTED
    assert combine([nothing, found(0.2), found(0.4, "b")]).level == NO_SIGN
    assert combine([found(0.2), found(0.4, "b")]).strength == pytest.approx(0.4)
    verdict = combine([found(0.2), found(1.5, "b")])
    assert (verdict.level, verdict.strength, verdict.calibrated) == (SIGNS, 1.5, False)
    levels = {combine([found(score)]).level for score in np.linspace(-3, 3, 20)}
    assert levels == {SIGNS, NO_SIGN}


def test_the_strongest_reasons_are_the_signs_in_their_order_or_what_comes_closest() -> None:
    signs = [
        found(1.5, "a"),
        found(9.0, "b"),
        found(0.9, "c"),
        found(2.0, "d"),
        found(3.0, "e"),
        found(99.0, "f", None),
    ]
    assert [each.check for each in strongest(signs)] == ["b", "e", "d"]
    assert [each.check for each in strongest([found(0.2, "a"), found(1.5, "b")])] == ["b"]
    assert [each.check for each in strongest([found(0.2, "a"), found(0.9, "b")])] == ["b", "a"]


def test_the_threshold_is_a_prediction_limit_or_the_highest_score() -> None:
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    one = set_threshold(scores, 0.05)
    assert one == Threshold(
        3.0, pytest.approx(3 + t.isf(0.05, 4) * np.std(scores, ddof=1) * math.sqrt(1.2)), 5
    )
    # Of 31 scores, the highest is exceeded with a chance of 1/32, and the second highest with 2/32.
    assert set_threshold([0.0] * 29 + [90.0, 100.0], 0.02).value == 100.0
    assert set_threshold([0.0] * 29 + [90.0, 100.0], 0.07).value == 90.0
    with pytest.raises(ValueError, match="expected 5 scores"):
        set_threshold([1, 2, 3, 4], 0.05)


def test_normal_scores_exceed_the_threshold_as_often_as_the_level_says() -> None:
    draws = np.random.default_rng(0)
    level, trials = 0.1, 1500
    hits = [draws.normal() > set_threshold(draws.normal(size=20), level).value for _ in range(trials)]
    assert np.mean(hits) <= level + norm.isf(0.001) * math.sqrt(level * (1 - level) / trials)
    assert np.mean(hits) > level / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "analysis"}, "expected an audit calibration"),
        ({"schema_version": 7}, "schema version 1, got 7"),
        ({"checks": {"a/1": {"centre": 1}}}, "is damaged"),
        ({"checks": None}, "is damaged"),
        ({"verdict": {}}, "is damaged"),
        ({"level": 2}, r"is damaged .*expected a level in \(0, 1\)"),
        ({"level": 0}, r"is damaged .*expected a level in \(0, 1\)"),
        ({"checks": {"a/1": {**CHECK, "centre": math.nan}}}, "is damaged .*finite thresholds"),
        ({"checks": {"a/1": {**CHECK, "threshold": math.inf}}}, "is damaged .*finite thresholds"),
        ({"checks": {"a/1": {**CHECK, "clean": math.inf}}}, "is damaged .*OverflowError"),
    ],
)
def test_a_damaged_calibration_is_refused(change, message, tmp_path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({**DOCUMENT, **change}))
    with pytest.raises(RecordError, match=message):
        calibration.load(file)
    for text in ("{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(RecordError, match="not valid JSON"):
            calibration.load(file)
    for key, value in (("level", 0.05), ("centre", 1.0), ("threshold", 3.0), ("clean", 10)):
        file.write_text(json.dumps(DOCUMENT).replace(f'"{key}": {value}', f'"{key}": 1e400'))
        assert "1e400" in file.read_text()
        with pytest.raises(RecordError, match="is damaged"):
            calibration.load(file)
    with pytest.raises(RecordError, match="No such file"):
        calibration.load(tmp_path / "none.json")


def test_the_packaged_calibration_is_valid_if_there_is_one() -> None:
    known = calibration.packaged()
    assert known is None or (known.thresholds and known.document["commit"])
