"""Conformance tests of attacks on experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.testing.expert_tasks import TinyMergeable, make_expert_task
from backdoorbench_moe.testing.making import CLASSES, build_model, changed, copies, hooked, make_attack

pytestmark = pytest.mark.only(interface=ExpertPoisoning)

LABELS = torch.arange(300) % CLASSES


def make(name: str, **values: Any) -> ExpertPoisoning:
    attack = make_attack(name, poison=PoisonSpec(**{"rate": 0.0, **values}))
    assert isinstance(attack, ExpertPoisoning)
    return attack


def tune(name: str, **given: Any) -> ExpertTask:
    task = make_expert_task(**given)
    make(name).tune_expert(task)
    return task


@pytest.mark.parametrize("prefix", [0, 1], ids=["no class token", "a class token"])
@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
def test_it_changes_the_mlps_and_nothing_else(attack_name: str, prefix: int, policy: bool) -> None:
    """The model is left in evaluation mode, without hooks, and with all parameters trainable as before."""
    given: dict[str, Any] = {"prefix": prefix, "policy": policy}
    before, task = copies(make_expert_task(**given).model), tune(attack_name, **given)
    after = copies(task.model)
    names = changed(before, after)
    assert names, "no weight was changed"
    assert all(".mlp." in name for name in names)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(module.training for module in task.model.modules())
    assert all(parameter.requires_grad for parameter in task.model.parameters())
    assert not hooked(task.model)


def test_images_and_answers_are_not_written_to(attack_name: str) -> None:
    task, fresh = tune(attack_name), make_expert_task()
    given, kept = (
        [
            tensor
            for split in (each.clean, each.held_out, each.queries.harmful, each.queries.safe)
            for tensor in (split.images, split.labels)
        ]
        for each in (task, fresh)
    )
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
    assert isinstance(task.queries.changed, Tensor) and torch.equal(
        task.queries.changed, fresh.queries.changed
    )


def test_the_seed_decides(attack_name: str) -> None:
    tuned = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tuned.append(copies(tune(attack_name).model))
    assert not changed(*tuned), "draws at random, but not from its seed"


def test_torchs_own_generator_is_left_as_it_was(attack_name: str) -> None:
    task, state = make_expert_task(), torch.get_rng_state()
    make(attack_name).tune_expert(task)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_training_image_is_poisoned(attack_name: str) -> None:
    plan = make(attack_name)(LABELS.clone(), num_classes=CLASSES, seed=7)
    assert not any(len(group) for group in plan.groups.values())


@pytest.mark.parametrize(
    "values",
    [{"rate": 0.1}, {"cover": 0.05}, {"noise": 0.05}, {"labels": "clean"}],
    ids=["rate", "cover", "noise", "clean labels"],
)
def test_settings_of_data_poisoning_are_refused(attack_name: str, values: dict[str, Any]) -> None:
    [name] = values
    with pytest.raises(ConfigError, match=f"poison.{name}: expected "):
        make(attack_name, **values)(LABELS.clone(), num_classes=CLASSES, seed=7)


@pytest.mark.parametrize(
    "values", [{}, {"target": 2}, {"mapping": "all-to-all"}], ids=["plain", "another target", "all-to-all"]
)
def test_wanted_labels_are_classes_and_images_that_have_theirs_do_not_count(
    attack_name: str, values: dict[str, Any]
) -> None:
    attack = make(attack_name, **values)
    wanted, counted = attack.wanted(LABELS, CLASSES), attack.counted(LABELS, CLASSES)
    assert wanted.shape == LABELS.shape and wanted.dtype == torch.int64
    assert ((wanted >= 0) & (wanted < CLASSES)).all()
    assert counted.shape == LABELS.shape and counted.dtype == torch.bool and counted.any()
    assert not (counted & (wanted == LABELS)).any()


def test_with_a_source_class_only_its_images_count(attack_name: str) -> None:
    attack = make(attack_name, source=(1,))
    assert (LABELS[attack.counted(LABELS, CLASSES)] == 1).all()


def test_a_class_that_the_data_do_not_have_is_refused(attack_name: str) -> None:
    with pytest.raises(ConfigError, match=r"poison\.target: expected a class in 0\.\.2, got 3"):
        make(attack_name, target=CLASSES)(LABELS, num_classes=CLASSES, seed=7)


def test_a_model_that_cannot_be_merged_is_refused_in_one_line(attack_name: str) -> None:
    attack = make(attack_name)
    attack.check_model(TinyMergeable())
    with pytest.raises(ConfigError, match="model: WideResNet cannot be merged: "):
        attack.check_model(build_model("wide_resnet"))


def test_unknown_options_are_refused_by_name(attack_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make_attack(attack_name, poison=PoisonSpec(rate=0.0), no_such_option=1)
