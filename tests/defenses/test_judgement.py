"""What a judgement may hold, and what a defense may declare and return."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from defense_tasks import make_task, used_model
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError, PluginError


def judge(images: Tensor) -> Tensor:
    return images.flatten(1).float().mean(1)


RIGHT = {
    "input": Judgement("input", "it is bright", threshold=0.5, judge=judge),
    "sample": Judgement("sample", "odd", scores=torch.tensor([0.5, 2.0]), suspicious=torch.tensor([1])),
    "class": Judgement("class", "high", scores={"0": 1, "1": np.float32(2.5)}, suspicious=["1"]),
    "expert": Judgement("expert", "low", scores={"moe/0": torch.tensor(0.5)}, threshold=1.0),
    "model": Judgement("model", "a class is suspicious", suspicious=("model",)),
}
WRONG = [
    ("input", {"threshold": None}, "judgement about input: threshold: expected a finite number, got None"),
    ("input", {"judge": None}, "judgement about input: judge: expected a function"),
    ("input", {"scores": {"0": 1.0}}, "judgement about input: scores: expected none"),
    ("input", {"suspicious": ["0"]}, "judgement about input: suspicious: expected none"),
    ("sample", {"judge": judge}, "judgement about sample: judge: expected a function for inputs, and none"),
    ("sample", {"scores": [0.5, 2.0]}, r"judgement about sample: scores: expected a tensor \(N,\) of floats"),
    ("sample", {"scores": torch.rand(2, 1)}, "judgement about sample: scores: expected"),
    ("sample", {"scores": torch.tensor([1, 2])}, "judgement about sample: scores: expected"),
    ("sample", {"suspicious": [1]}, "judgement about sample: suspicious: expected a tensor"),
    ("sample", {"suspicious": torch.tensor([True, False])}, "judgement about sample: suspicious: expected"),
    ("class", {"scores": torch.rand(3)}, "judgement about class: scores: expected numbers by name"),
    ("class", {"scores": {0: 1.0}}, "judgement about class: scores: expected numbers by name"),
    ("class", {"scores": {"0": "high"}}, "judgement about class: scores: expected numbers by name"),
    ("expert", {"suspicious": "moe/0"}, "judgement about expert: suspicious: expected a list of names"),
    ("expert", {"suspicious": [0]}, "judgement about expert: suspicious: expected a list of names"),
    ("expert", {"suspicious": 3}, "judgement about expert: suspicious: expected a list of names, got 3"),
    (
        "expert",
        {"suspicious": None},
        "judgement about expert: suspicious: expected a list of names, got None",
    ),
    (
        "expert",
        {"suspicious": torch.tensor(3)},
        "judgement about expert: suspicious: expected a list of names",
    ),
    ("sample", {"suspicious": torch.tensor(3)}, "judgement about sample: suspicious: expected a tensor"),
    ("sample", {"suspicious": None}, "judgement about sample: suspicious: expected a tensor"),
    ("input", {"suspicious": None}, "judgement about input: suspicious: expected none"),
    ("expert", {"threshold": "high"}, "judgement: threshold: expected a finite number, got 'high'"),
    ("expert", {"threshold": 10**400}, "judgement: threshold: expected a finite number"),
    ("expert", {"threshold": math.nan}, "judgement: threshold: expected a finite number, got nan"),
    ("expert", {"details": ["a"]}, "judgement about expert: details: expected values by name"),
    ("expert", {"details": {"of": {1, 2}}}, "judgement about expert: details: expected values that JSON has"),
    ("class", {"arrays": {"scores": torch.rand(2)}}, "arrays: expected tensors by name, other than scores"),
    ("class", {"arrays": {"masks": [0.5]}}, "judgement about class: arrays: expected tensors by name"),
    ("class", {"arrays": torch.rand(2)}, "judgement about class: arrays: expected tensors by name"),
    ("model", {"reason": ""}, "judgement: reason: expected a sentence"),
    ("model", {"about": "image"}, "judgement: about: expected one of"),
]


@pytest.mark.parametrize(("about", "values", "message"), WRONG)
def test_a_field_that_is_not_possible_is_refused_at_once(about, values, message) -> None:
    with pytest.raises(PluginError, match=message):
        replace(RIGHT[about], **values)


def test_details_of_other_libraries_are_made_plain() -> None:
    details = {"rounds": np.int64(3), "norms": torch.tensor([0.5, 1.0]), "nested": {"a": np.float32(0.1)}}
    made = replace(RIGHT["model"], details=details).details
    assert made == {"rounds": 3, "norms": [0.5, 1.0], "nested": {"a": 0.1}} and type(made["rounds"]) is int


class Returns(Defense):
    """Returns what it is told to."""

    made: object = None

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Return it."""
        return self.made


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda model: model, "expected a DefenseResult, got [A-Za-z]+$"),
        (lambda model: DefenseResult("done", model, ({"about": "class"},)), "expected judgements, got"),
        (
            lambda model: DefenseResult("done", model, (RIGHT["input"],) * 2),
            "expected at most one judgement about inputs",
        ),
        (
            lambda model: DefenseResult("done", model, (RIGHT["sample"], RIGHT["class"], RIGHT["sample"])),
            "expected at most one judgement about samples",
        ),
    ],
)
def test_a_result_that_is_not_one_is_refused(result, message) -> None:
    defense, model = Returns(), used_model()
    defense.made = result(model)
    with pytest.raises(PluginError, match=f"^defense 'Returns': {message}"):
        defense(make_task(model)[0])


def test_a_need_that_does_not_exist_is_refused_with_near_names(monkeypatch) -> None:
    monkeypatch.setattr(Returns, "needs", frozenset({"clean", "feature"}))
    with pytest.raises(
        PluginError, match=r"^defense 'Returns': needs: unknown 'feature'; did you mean 'features'"
    ):
        Returns()


def test_features_are_needed_of_the_model(monkeypatch) -> None:
    """Before the defense runs, and before its own check."""
    monkeypatch.setattr(Returns, "needs", frozenset({"features"}))
    monkeypatch.setattr(Returns, "check", lambda *_: pytest.fail("checked"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    task, _ = make_task(used_model())
    for ask in (lambda: Returns().check_model(model), lambda: Returns()(replace(task, model=model))):
        with pytest.raises(ConfigError, match=r"^model: Sequential does not give features before its head"):
            ask()


def test_without_clean_images_among_its_needs_a_defense_gets_none(monkeypatch) -> None:
    monkeypatch.setattr(Returns, "needs", frozenset({"training-set"}))
    assert Returns().count(1000, 3) == Returns().count(1, 3) == 0
