"""What an audit will take, and which checks a budget leaves out."""

from __future__ import annotations

import pytest
import torch
from planted_models import row_images
from subjects import Constant, Rows

from backdoorbench_moe.auditing.audit import run_audit
from backdoorbench_moe.auditing.checks import inversion
from backdoorbench_moe.auditing.checks.inversion import CapturedExpert, InvertedImage, InvertedPatch
from backdoorbench_moe.auditing.opening import with_store
from backdoorbench_moe.auditing.plan import Plan
from backdoorbench_moe.auditing.store import Store
from backdoorbench_moe.auditing.subject import Subject, make_subject
from backdoorbench_moe.auditing.verdict import NOT_TESTED
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.engine.progress.observer import Observer


class Dear(Constant):
    """A check that passes many images; with a speed of 100 images/s, three seconds each hundred."""

    def __init__(self, name: str, trained: float) -> None:
        super().__init__(name, 0.5)
        self.trained = trained

    def cost(self, subject: Subject) -> Cost:
        """As told."""
        return Cost(trained=self.trained)


@pytest.fixture(autouse=True)
def speed(monkeypatch) -> None:
    """A model that predicts 100 images a second."""
    monkeypatch.setattr(Plan, "_images_per_second", 100.0)


def test_seconds_follow_from_the_cost_and_the_speed() -> None:
    checks = [Constant("free", 0.5), Dear("dear", 1000)]
    plan = Plan(make_subject(Rows()), Store(None, ""), checks, None)
    # Forward and backward take three times as long as forward: 3 * 1000 / 100.
    assert [plan.seconds(check) for check in checks] == [0.0, 30.0]
    assert plan.total == 30.0
    assert not any(map(plan.too_long, checks))


def test_checks_that_take_too_long_are_left_out_and_can_be_made_later(tmp_path) -> None:
    checks = [Dear("hours", 1_000_000), Dear("seconds", 100)]
    subject, store = with_store(make_subject(Rows()), tmp_path)
    first = run_audit(subject, name="a model", store=store, checks=checks, budget=60.0, calibrated=False)
    assert [check.runs for check in checks] == [0, 1]
    assert first.findings[0].level == NOT_TESTED
    assert first.findings[0].reason.startswith(
        "it would take about 8.3 h, and 60 s are left of the budget of 60 s"
    )
    again = run_audit(subject, name="a model", store=store, checks=checks, calibrated=False)
    assert [check.runs for check in checks] == [1, 1]
    assert NOT_TESTED not in [each.level for each in again.findings]


def test_a_check_that_is_made_costs_nothing(tmp_path) -> None:
    check = Dear("once", 1_000_000)
    subject, store = with_store(make_subject(Rows()), tmp_path)
    run_audit(subject, name="a model", store=store, checks=[check], calibrated=False)
    found = run_audit(subject, name="a model", store=store, checks=[check], budget=1.0, calibrated=False)
    assert check.runs == 1 and found.findings[0].level != NOT_TESTED


def test_a_check_includes_what_it_uses_unless_that_was_made_before(monkeypatch) -> None:
    monkeypatch.setattr("backdoorbench_moe.auditing.plan.lacks", lambda *_: "")
    monkeypatch.setattr(inversion.Inverted, "cost", lambda *_: Cost(trained=1000))
    monkeypatch.setattr(CapturedExpert, "cost", lambda *_: Cost(predicted=100))
    subject, store = make_subject(Rows(), images=row_images(20).images), Store(None, "")
    captured = CapturedExpert()
    assert Plan(subject, store, [captured], None).seconds(captured) == 1 + 30 + 30
    every = [InvertedImage(), InvertedPatch(), captured]
    assert Plan(subject, store, every, None).seconds(captured) == 1
    plan = Plan(subject, store, every, 10.0)
    assert plan.too_long(every[0])
    assert plan.seconds(captured) == 1 + 30


def test_the_time_is_said_before(monkeypatch) -> None:
    said: list[str] = []
    observer = Observer()
    monkeypatch.setattr(observer, "on_message", said.append)
    subject, store = with_store(make_subject(Rows()), None)
    checks = [Dear("minutes", 10_000), Constant("free", 0.5)]
    run_audit(subject, name="a model", store=store, checks=checks, calibrated=False, observer=observer)
    assert said == [
        "2 checks, about 5 min on this machine",
        "check 1 of 2: minutes (a constant), about 5 min",
        "check 2 of 2: free (a constant)",
    ]


@pytest.mark.parametrize(
    "given", [{}, {"image_size": 8}, {"images": torch.zeros(20, 3, 8, 8, dtype=torch.uint8)}]
)
def test_the_speed_is_measured(given, monkeypatch) -> None:
    monkeypatch.undo()
    plan = Plan(make_subject(Rows(), **given), Store(None, ""), [], None)
    assert plan._images_per_second > 0
