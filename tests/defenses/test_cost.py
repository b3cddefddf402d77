"""The stated cost of a defense is the number of images that pass the model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from defense_tasks import make_task, used_model
from tiny import Tiny, tiny_spec
from torch import nn

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.estimate import defense_cost
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost

HELD = 24
STATED = {
    "fine-tuning": {"epochs": 2},
    "fine-pruning": {"epochs": 2, "ratio": 0.25},
    "expert-drop": {"count": 2, "epochs": 1},
    "expert-reset": {"epochs": 2},
    "router-reset": {"epochs": 1},
    "reroute": {},
    "strip": {"blends": 4, "fpr": 0.25},
    "routing-strip": {"blends": 4, "fpr": 0.25},
}


class Counted:
    """Counts the images that enter the first layer of a model, with and without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.images = Counter[bool]()
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self._hook = first.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.images[torch.is_grad_enabled()] += len(inputs[0])


@pytest.mark.parametrize("name", STATED)
def test_as_many_images_pass_as_it_says(name) -> None:
    defense, model = create_defense(name, **STATED[name]), used_model()
    cost = defense.cost(model, held=HELD, train=1000, classes=3)
    assert cost is not None
    counted, (task, _) = Counted(model), make_task(model)
    result = defense(task)
    assert (counted.images[True], counted.images[False]) == (cost.trained, cost.predicted)
    if result.filter is not None:
        assert result.filter.judge is not None
        counted.images.clear()
        result.filter.judge(task.clean.images[:5])
        assert counted.images == {False: 5 * cost.judged}
    else:
        assert cost.judged == 0


class Idle(Defense):
    """Says nothing of its cost."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        return DefenseResult("idle", task.model)


def test_without_epochs_the_cost_is_not_known() -> None:
    given = {"held": HELD, "train": 1000, "classes": 3}
    model = nn.Linear(1, 1)
    assert Idle().cost(model, **given) is None
    lasting = Idle()
    lasting.epochs = 3  # type: ignore[attr-defined]
    assert lasting.cost(model, **given) == Cost(trained=72)
    assert lasting.cost(model, **{**given, "held": 0}) == Cost(trained=3000), "then on the training set"


def test_training_and_judging_count_as_forward_passes() -> None:
    assert Cost(trained=10, predicted=5, judged=2).forward(100) == 30 + 5 + 200


class Longer(Idle):
    """Has an option `epochs`, and no attribute of this name."""

    def __init__(self, *, epochs: int = 2, clean_fraction: float = 0.5) -> None:
        super().__init__(clean_fraction=clean_fraction)
        self.lasts = epochs


def test_an_estimate_takes_the_option_epochs_where_nothing_is_stated() -> None:
    images = Tiny().load()
    for name, part in (("longer", Longer), ("idle", Idle)):
        defenses.registry.register(name)(part)
    try:
        [longer, idle] = (tiny_spec(defenses=[name]) for name in ("longer", "idle"))
        assert defense_cost(longer, images, nn.Linear(1, 1)) == Cost(trained=2 * 48)
        assert defense_cost(idle, images, nn.Linear(1, 1)) is None
    finally:
        for name in ("longer", "idle"):
            defenses.registry.unregister(name)
