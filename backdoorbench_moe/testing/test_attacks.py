"""Conformance tests of attacks that poison data; for attacks on experts see `test_expert_attacks`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.testing.making import make_attack

pytestmark = pytest.mark.only(interface=Attack, without=ExpertPoisoning)

CLASSES = 3
LABELS = torch.arange(300) % CLASSES
SPECS = {
    "plain": PoisonSpec(rate=0.1),
    "another target": PoisonSpec(rate=0.05, target=2),
    "all-to-all": PoisonSpec(rate=0.1, mapping="all-to-all"),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def attack(request: pytest.FixtureRequest, attack_name: str) -> Attack:
    return make_attack(attack_name, poison=request.param)


def plan(attack: Attack, seed: int = 7) -> PoisonPlan:
    return attack(LABELS.clone(), num_classes=CLASSES, seed=seed)


def same(one: PoisonPlan, other: PoisonPlan) -> bool:
    groups = zip(one.groups.values(), other.groups.values(), strict=True)
    return all(torch.equal(a, b) for a, b in groups) and torch.equal(one.labels, other.labels)


def test_the_seed_decides(attack: Attack) -> None:
    torch.manual_seed(1)
    first = plan(attack)
    torch.manual_seed(2)
    assert same(plan(attack), first), "draws at random, but not from its seed"


def test_planning_writes_to_nothing(attack: Attack) -> None:
    labels, state = LABELS.clone(), torch.get_rng_state()
    attack(labels, num_classes=CLASSES, seed=7)
    assert torch.equal(labels, LABELS), "the labels were written to"
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


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
    ids=["rate", "target", "all-to-all", "cover", "noise", "clean labels", "source"],
)
def test_settings_are_followed_or_refused(attack_name: str, values: dict[str, Any]) -> None:
    """An attack must not ignore a setting of the `PoisonSpec`, but may refuse it."""
    attack = make_attack(attack_name, poison=PoisonSpec(**{"rate": 0.1, **values}))
    [name] = values
    try:
        made = plan(attack)
    except ConfigError as error:
        assert f"poison.{name}: " in str(error), "the message does not name the setting"
        return
    true = LABELS[made.indices]
    wanted = torch.equal(made.labels, attack.wanted(LABELS, CLASSES)[made.indices])
    followed = {
        # An attack may round the number of each class.
        "rate": abs(len(made.indices) - attack.poison.count(len(LABELS))) <= CLASSES,
        "target": wanted,
        "mapping": wanted,
        "cover": len(made.cover) == attack.poison.count(len(LABELS), "cover"),
        "noise": len(made.noise) == attack.poison.count(len(LABELS), "noise"),
        "labels": torch.equal(made.labels, true),
        "source": bool((true == 1).all()),
    }
    assert followed[name], f"poison.{name} is ignored"


def test_wanted_labels_are_classes_and_images_that_have_theirs_do_not_count(attack: Attack) -> None:
    wanted, counted = attack.wanted(LABELS, CLASSES), attack.counted(LABELS, CLASSES)
    assert wanted.shape == LABELS.shape and wanted.dtype == torch.int64
    assert ((wanted >= 0) & (wanted < CLASSES)).all()
    assert counted.shape == LABELS.shape and counted.dtype == torch.bool and counted.any()
    assert not (counted & (wanted == LABELS)).any()


def test_a_class_that_the_data_do_not_have_is_refused(attack_name: str) -> None:
    attack = make_attack(attack_name, poison=PoisonSpec(rate=0.1, target=CLASSES))
    with pytest.raises(ConfigError, match=r"poison\.target: expected a class in 0\.\.2, got 3"):
        plan(attack)


def test_unknown_options_are_refused_by_name(attack_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make_attack(attack_name, poison=PoisonSpec(), no_such_option=1)
