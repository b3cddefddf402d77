"""The conformance tests grant a defense what it declares in `needs`, and hold attacks to their settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe import attacks, defenses
from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.data_poisoning import DataPoisoning
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.testing import test_attacks, test_defenses


class LowLoss(Defense):
    """Needs no clean images."""

    needs = frozenset({"training-set", "losses"})

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge the training samples by their losses."""
        losses = task.losses(task.model, task.training_set)
        return DefenseResult("judged", task.model, (Judgement("sample", "low", scores=-losses),))


class Undeclared(LowLoss):
    """Uses the losses without declaring it."""

    needs = frozenset({"training-set"})


class WithoutNumber(LowLoss):
    """Its scores are no numbers."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge a class."""
        judged = Judgement("class", "high", scores={"0": 0.5, "1": float("nan")})
        return DefenseResult("judged", task.model, (judged,))


class TooFewScores(LowLoss):
    """Has no score for the last image."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge the other training samples."""
        losses = task.losses(task.model, task.training_set)
        return DefenseResult("judged", task.model, (Judgement("sample", "low", scores=-losses[:-1]),))


class SuspectsWhatIsNotThere(LowLoss):
    """Reports an image beyond the last one."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge it."""
        suspicious = torch.tensor([len(task.training_set)])
        judged = Judgement("sample", "low", suspicious=suspicious)
        return DefenseResult("judged", task.model, (judged,))


class FailsForBlack(Defense):
    """A filter that divides zero by zero for a black image."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Score an image by its red share."""

        def judge(images: torch.Tensor) -> torch.Tensor:
            sums = images.double().sum((2, 3))
            return sums[:, 0] / sums.sum(1)

        judged = Judgement("input", "red", threshold=0.5, judge=judge)
        return DefenseResult("filtered", task.model, (judged,))


class WritesToTheTrainingSet(LowLoss):
    """Removes images by changing the tensors that it got."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Make ten images black."""
        task.training_set.images[:10] = 0
        return super().defend(task)


class Centred(Defense):
    """Needs features, which not every model gives."""

    needs = frozenset({"clean", "features"})

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Compute them."""
        assert task.features(task.model, task.clean.images).ndim == 2
        return DefenseResult("centred", task.model)


@pytest.fixture
def offer(monkeypatch):
    """Offer a defense under the name "own" for the test."""
    return lambda part: monkeypatch.setitem(defenses.registry._local, "own", part)


def test_a_defense_that_needs_no_clean_images_passes(offer) -> None:
    offer(LowLoss)
    test_defenses.test_number_of_clean_images("own")
    test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "pmoe")
    test_defenses.test_the_seed_decides("own", "pmoe")


def test_a_defense_that_uses_what_it_does_not_declare_fails(offer) -> None:
    offer(Undeclared)
    with pytest.raises(PluginError, match=r"^defense 'own': uses 'losses', which is not declared"):
        test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "pmoe")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (TooFewScores, "expected a finite score for each of 48 training images, got 47"),
        (SuspectsWhatIsNotThere, r"expected indices in 0\.\.47, got \[48\]"),
    ],
)
def test_judgements_that_are_not_about_the_training_set_fail(offer, part, message) -> None:
    offer(part)
    with pytest.raises(PluginError, match=message):
        test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "wide_resnet")


def test_a_filter_without_a_score_for_a_black_image_fails(offer) -> None:
    offer(FailsForBlack)
    with pytest.raises(AssertionError, match="the score of an image is not finite"):
        test_defenses.test_a_filter_judges_every_image_by_itself("own", "wide_resnet")


def test_a_defense_that_writes_to_the_training_set_fails(offer) -> None:
    offer(WritesToTheTrainingSet)
    with pytest.raises(AssertionError, match="'training-set' were written to"):
        test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "wide_resnet")


def test_scores_that_are_no_numbers_fail(offer) -> None:
    offer(WithoutNumber)
    with pytest.raises(AssertionError, match="scores of class"):
        test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "pmoe")


def test_a_defense_that_needs_features_is_refused_for_models_without(offer, monkeypatch) -> None:
    offer(Centred)
    test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "pmoe")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    monkeypatch.setattr(test_defenses, "used_model", lambda name: plain.eval())
    assert "does not give features" in str(test_defenses.refusal("own", "pmoe"))
    test_defenses.test_a_model_is_refused_in_one_line_or_defended("own", "pmoe")


class Deaf(Attack):
    """Poisons the first images, whatever the settings are."""

    def plan(self, labels: torch.Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Choose them."""
        indices = torch.arange(30)
        return PoisonPlan(indices, torch.zeros_like(indices))


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 0.05},
        {"target": 2},
        {"mapping": "all-to-all"},
        {"cover": 0.05},
        {"noise": 0.05},
        {"labels": "clean"},
        {"source": (1,)},
    ],
)
def test_an_attack_that_ignores_a_setting_fails(values, monkeypatch) -> None:
    monkeypatch.setitem(attacks.registry._local, "own", Deaf)
    [name] = values
    with pytest.raises(AssertionError, match=f"poison.{name} is ignored"):
        test_attacks.test_settings_are_followed_or_refused("own", values)
    monkeypatch.setitem(attacks.registry._local, "own", DataPoisoning)
    test_attacks.test_settings_are_followed_or_refused("own", values)
