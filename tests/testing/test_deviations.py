"""Known deviations: a part declares the conformance tests that it fails, and is held to exactly that."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from third_party import bbmoe, put_package, python

from backdoorbench_moe.cli.plugin.check import _print_deviations
from backdoorbench_moe.testing.check import Deviation, PartCheck
from backdoorbench_moe.testing.deviations import Deviations, declared, declares
from backdoorbench_moe.triggers import registry
from backdoorbench_moe.triggers.base import Trigger

PARTS = """
import random

import torch
from torch import nn

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.attacks.data_poisoning import DataPoisoning
from backdoorbench_moe.triggers.base import Trigger


class Negative(Trigger):
    def stamp(self, images):
        return 1 - images


class Steps(Trigger):
    deviations = {"test_gradients_reach_the_images": "rounds to 8 bits"}

    def stamp(self, images):
        return ((1 - images) * 255).round() / 255


class Undeclared(Steps):
    deviations = {}


class HalfPrecision(Trigger):
    deviations = {
        "test_shape_type_and_range": "has no bfloat16",
        "test_forms_keep_shape_type_and_range": "has no bfloat16",
        "test_a_trigger_has_no_memory": "has no bfloat16",
    }

    def stamp(self, images):
        if images.dtype == torch.bfloat16:
            raise TypeError("no bfloat16")
        return 1 - images


class Passing(Negative):
    deviations = {
        "test_gradients_reach_the_images": "it did once",
        "test_images_do_not_mix": "and so did this",
    }


class Misspelt(Steps):
    deviations = {"test_gradient_reach_the_image": "rounds to 8 bits"}


class OfAnotherKind(Negative):
    deviations = {"test_a_gradient_reaches_every_parameter_and_the_images": "a test of models"}


class Malformed(Negative):
    deviations = ["test_gradients_reach_the_images"]


class NoReason(Steps):
    deviations = {"test_gradients_reach_the_images": " "}


class Whole(Applicator):
    def apply(self, images, trigger):
        return trigger(images)


class Unseeded(DataPoisoning):
    deviations = {"test_the_seed_decides": "asks the weather"}

    def plan(self, labels, num_classes, seed):
        return super().plan(labels, num_classes, seed + random.randrange(10**6))


class Mean(nn.Module):
    deviations = {"test_the_seed_decides_the_weights": "starts at zero"}

    def __init__(self, *, num_classes=10, image_size=32):
        super().__init__()
        self.head = nn.Linear(3, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, images):
        return self.head(images.mean((2, 3)))
"""
TRIGGERS = {
    "negative": "Negative",
    "steps": "Steps",
    "undeclared": "Undeclared",
    "half": "HalfPrecision",
    "passing": "Passing",
    "misspelt": "Misspelt",
    "another-kind": "OfAnotherKind",
    "malformed": "Malformed",
    "no-reason": "NoReason",
}
GRADIENTS = "test_gradients_reach_the_images"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    points = {
        "triggers": [f"{name} = dev_parts:{cls}" for name, cls in TRIGGERS.items()],
        "applicators": ["whole = dev_parts:Whole"],
        "attacks": ["unseeded = dev_parts:Unseeded"],
        "models": ["mean = dev_parts:Mean"],
    }
    put_package(folder, "bbmoe-deviates", modules={"dev_parts": PARTS}, points=points)
    put_package(
        folder,
        "bbmoe-honest",
        modules={},
        points={"triggers": ["a = dev_parts:Steps", "b = dev_parts:Negative"]},
    )
    return folder


@pytest.fixture(scope="module")
def parts(site: Path) -> dict[str, dict[str, Any]]:
    """The outcome of the check of every part, by its name."""
    done = bbmoe("plugin", "check", "bbmoe-deviates", "--json", path=[site])
    assert done.returncode == 1 and done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert not report["passes"]
    return {part["name"]: part for part in report["parts"]}


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
@pytest.mark.parametrize(
    ("name", "test", "reason"),
    [
        ("steps", GRADIENTS, "rounds to 8 bits"),
        ("unseeded", "test_the_seed_decides", "asks the weather"),
    ],
)
def test_a_declared_deviation_passes_and_is_shown(
    parts: dict[str, dict[str, Any]], name: str, test: str, reason: str
) -> None:
    part = parts[name]
    assert part["result"] == "passes" and part["failed"] == 0 and part["failures"] == []
    [deviation] = part["deviations"]
    assert (deviation["test"], deviation["reason"]) == (test, reason)
    assert 1 <= deviation["failing"] <= deviation["cases"]


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
def test_a_model_may_declare_deviations_and_fails_for_what_it_does_not_declare(
    parts: dict[str, dict[str, Any]],
) -> None:
    part = parts["mean"]
    assert [one["reason"] for one in part["deviations"]] == ["starts at zero"]
    assert part["result"] == "fails" and "test_logits" in {failure["test"] for failure in part["failures"]}


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
def test_the_same_part_fails_without_the_declaration(parts: dict[str, dict[str, Any]]) -> None:
    part = parts["undeclared"]
    assert part["result"] == "fails" and part["deviations"] == []
    assert {failure["test"] for failure in part["failures"]} == {GRADIENTS}


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
def test_a_deviation_may_concern_some_cases_only(parts: dict[str, dict[str, Any]]) -> None:
    part = parts["half"]
    assert part["result"] == "passes", part["failures"]
    shares = {one["test"]: (one["failing"], one["cases"]) for one in part["deviations"]}
    # 6 canvases in 4 types, of which bfloat16 is one; with each of 3 applicators 4 canvases in 3 types.
    assert shares["test_forms_keep_shape_type_and_range"] == (6, 24)
    assert shares["test_shape_type_and_range"] == (6 + 12, 24 + 36)
    assert shares["test_a_trigger_has_no_memory"] == (1, 1)


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "passing",
            f"deviations: {GRADIENTS} passes; remove it; "
            "deviations: test_images_do_not_mix passes in all of its 5 cases; remove it",
        ),
        ("misspelt", f"deviations: unknown 'test_gradient_reach_the_image'; did you mean '{GRADIENTS}'"),
        ("another-kind", "deviations: unknown 'test_a_gradient_reaches_every_parameter_and_the_images'; "),
        ("malformed", f"deviations: expected a mapping from names of tests to reasons, got ['{GRADIENTS}']"),
        (
            "no-reason",
            f"deviations: expected a mapping from names of tests to reasons, got {{'{GRADIENTS}': ' '}}",
        ),
    ],
)
def test_a_deviation_that_is_none_is_a_failure_in_one_line(
    parts: dict[str, dict[str, Any]], name: str, message: str
) -> None:
    part = parts[name]
    assert part["result"] == "fails" and part["deviations"] == []
    [failure] = [failure for failure in part["failures"] if failure["test"] == "test_deviations"]
    assert failure["reason"].startswith(message) and "\n" not in failure["reason"]
    assert failure["line"] == ""


@pytest.mark.slow
@pytest.mark.xdist_group("deviations")
def test_parts_without_deviations_are_neither_blamed_nor_counted(parts: dict[str, dict[str, Any]]) -> None:
    """The applicator and a trigger are tested together; it is the trigger that deviates."""
    for name in ("negative", "whole"):
        assert parts[name]["result"] == "passes" and parts[name]["deviations"] == []


def run_honest(site: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "backdoorbench_moe.testing", "bbmoe-honest", *more, path=[site])


@pytest.mark.slow
def test_the_table_shows_the_deviation(site: Path) -> None:
    done = bbmoe("plugin", "check", "bbmoe-honest", path=[site])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[1].split() == ["kind", "name", "result", "passed", "failed", "skipped", "deviations"]
    assert [(row.split()[1], row.split()[-1]) for row in lines[2:4]] == [("a", "1"), ("b", "0")]
    assert lines[4] == f"trigger a has 1 deviation: {GRADIENTS} (rounds to 8 bits)"
    assert lines[5] == "all parts of bbmoe-honest conform to their interfaces, with 1 deviation"


@pytest.mark.slow
def test_pytest_shows_the_reason(site: Path) -> None:
    done = run_honest(site, "-k", "gradients or deviations", "-rx", "-v")
    assert done.returncode == 0, done.stdout
    assert "trigger a: rounds to 8 bits" in done.stdout and "1 xfailed" in done.stdout
    assert "test_deviations[trigger a] PASSED" in done.stdout
    assert "test_deviations[trigger b]" not in done.stdout, "it declares nothing"


@pytest.mark.slow
def test_a_selection_of_tests_says_nothing_of_those_that_did_not_run(site: Path) -> None:
    done = run_honest(site, "-k", "no_memory or deviations")
    assert done.returncode == 0, done.stdout


def test_what_is_printed_by_hand() -> None:
    deviations = [
        Deviation("test_a", 2, 5, "it is red"),
        Deviation("test_b", 1, 1, "it is late"),
    ]
    console = Console(file=StringIO(), width=200)
    _print_deviations(console, PartCheck("trigger", "dot", deviations=deviations))
    _print_deviations(console, PartCheck("trigger", "none"))
    assert console.file.getvalue() == (
        "trigger dot has 2 deviations: test_a in 2 of 5 cases (it is red); test_b (it is late)\n"
    )


class Named(Trigger):
    deviations: ClassVar[Mapping[str, str]] = {"test_a": "why"}

    def stamp(self, images: Any) -> Any:
        return 1 - images


@pytest.fixture
def part() -> Any:
    registry.register("named")(Named)
    yield ("trigger", "named")
    registry.unregister("named")


@pytest.mark.parametrize(
    ("outcomes", "passes"),
    [
        (["passed"], True),
        (["passed", "passed"], True),
        (["passed", "skipped"], True),
        (["skipped", "skipped"], False),
        (["deviates"], False),
        (["passed", "deviates"], False),
        # Of two cases one did not run.
        (["passed", None], False),
        ([None], False),
    ],
)
def test_when_a_deviation_counts_as_passing(
    part: tuple[str, str], outcomes: list[str | None], passes: bool
) -> None:
    deviations = Deviations()
    for outcome in outcomes:
        assert deviations.collect([part, ("applicator", "image")], "test_a") == "trigger named: why"
        assert deviations.collect([part], "test_b") is None
        if outcome:
            deviations.record([part], "test_a", outcome)
    faults = deviations.faults(part, {"test_a", "test_b"})
    assert [" passes" in fault for fault in faults] == [True] * passes
    assert deviations.faults(part, None) == faults


def test_the_names_of_tests_are_judged_only_if_all_are_known(part: tuple[str, str]) -> None:
    [fault] = Deviations().faults(part, {"test_ab", "test_c"})
    assert fault.startswith("deviations: unknown 'test_a'; did you mean 'test_ab'")
    assert Deviations().faults(part, None) == []


def test_built_in_parts_declare_nothing() -> None:
    assert not declares("trigger", "warp") and declared("model", "pmoe") == {}
