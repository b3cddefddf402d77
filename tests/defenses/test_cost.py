"""The stated cost of a defense is the number of images that pass the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from defense_tasks import make_task, used_model
from tiny import Tiny, tiny_spec
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from backdoorbench_moe import defenses
from backdoorbench_moe.bench.running.estimate import defense_cost
from backdoorbench_moe.bench.running.plan import Planned
from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.testing import making
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task, task_split

HELD, TRAIN, CLASSES = 24, 48, 3
RECIPE = TrainSpec(epochs=2, batch_size=8)
GIVEN = {"held": HELD, "train": TRAIN, "classes": CLASSES, "recipe": RECIPE}

FILTER = {"fpr": 0.25, "reserve": 8}
JUDGED = {"retrain": False}
THROWN_OUT = {"epsilon": 0.1}
THREE = {"models": 3, "error": 1.0, **FILTER}  # No model is wrong about more than all images: all are tried.

# Those that pass as many images as they say, on a small pMoE.
EXACT: list[tuple[str, dict[str, object]]] = [
    ("fine-tuning", {"epochs": 2}),
    ("fine-pruning", {"epochs": 2, "ratio": 0.25}),
    ("expert-drop", {"count": 2, "epochs": 1}),
    ("expert-reset", {"epochs": 2}),
    ("router-reset", {"epochs": 1}),
    ("fst", {"epochs": 2}),
    ("ft-sam", {"epochs": 2}),
    ("tile-tuning", {"epochs": 2}),
    ("tile-distillation", {"epochs": 2}),
    ("reroute", {}),
    ("strip", {"blends": 4, "fpr": 0.25}),
    ("routing-strip", {"blends": 4, "fpr": 0.25}),
    ("scale-up", {"fpr": 0.25}),
    ("scale-up", {"fpr": 0.25, "factors": (2, 3), "normalise": True, "reserve": 10}),
    ("scale-up", {"threshold": 0.5}),
    ("ibd-psc", THREE),
    ("ibd-psc", {**THREE, "threshold": 0.5, "reserve": 1}),
    ("routing-load", FILTER),
    ("routing-load", {**FILTER, "load": "gates", "calibrate": 10}),
    ("bnp", {"u": 1.0}),
    ("bnp", {"u": 1.0, "experts": False}),
    ("anp", {"steps": 7, "batch_size": 10}),  # Batches of 10, 10, 4, 10, 10, 4, 10.
    ("anp", {"steps": 3, "batch_size": 23, "alpha": 0.0, "accuracy_drop": 100.0}),  # Of 23, 23, 23.
    ("rnp", {"epochs": 2, "batch_size": 10, "unlearn_to": 0.0, "accuracy_drop": 100.0}),
    ("nad", {"epochs": 2, "teacher_epochs": 3}),
    ("nad", {"epochs": 1, "layers": ("trunk",), "betas": (1.0,)}),
    ("neural-cleanse", {"epochs": 2, "unlearn_epochs": 3}),
    ("neural-cleanse", {"epochs": 2, "unlearn": "none"}),
    ("neural-cleanse", {"toward": "experts", "epochs": 2, "unlearn_epochs": 3}),
    ("spectral", {**JUDGED, **THROWN_OUT}),
    ("activation-clustering", {**JUDGED, "on": "routing"}),
    ("scan", {**JUDGED, "components": 4}),
    ("abl", {"ratio": 0.1}),
    ("abl", {"ratio": 0.25, "isolation_epochs": 2, "epochs": 3, "unlearning_epochs": 4}),
]
# Those that may pass fewer, as searches and trainings can end earlier, or images are thrown out.
FEWER: list[tuple[str, dict[str, object]]] = [
    ("ibd-psc", {**THREE, "error": 0.0}),
    ("rnp", {"epochs": 5, "batch_size": 10, "unlearn_to": 1.0, "accuracy_drop": 0.0}),
    ("neural-cleanse", {"epochs": 30, "patience": 1, "success": 0.01, "unlearn": "flagged"}),
    ("spectral", THROWN_OUT),
    ("spectral", {**THROWN_OUT, "epochs": 3}),
]
MIXTURES: list[tuple[str, dict[str, object]]] = [
    ("align", {"epochs": 3}),
    ("align", {"epochs": 1, "loss": "tuning", "scope": "gates+experts"}),
    ("defensive-expert", {"preference_epochs": 2, "epochs": 3, "gate_epochs": 4}),
    ("defensive-expert", {"preference_epochs": 0, "epochs": 1, "gate_epochs": 1}),
    ("rasa", {"rounds": 2, "epochs": 3}),
]


@pytest.fixture
def passed() -> Iterator[Counter[bool]]:
    """Counts the images that enter the first layer of any model, with and without gradients."""
    images = Counter[bool]()

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            images[torch.is_grad_enabled()] += len(inputs[0])

    hook = register_module_forward_pre_hook(count)
    yield images
    hook.remove()


def measure(
    passed: Counter[bool], name: str, options: dict[str, object]
) -> tuple[Cost, tuple[int, int], DefenseResult, DefenseTask]:
    """Apply a defense to a small pMoE; return the stated cost and the images trained on and predicted."""
    defense, model = create_defense(name, **options), used_model()
    task, _ = make_task(model, epochs=RECIPE.epochs, batch_size=RECIPE.batch_size)
    held = HELD if "clean" in defense.needs else 0
    cost = defense.cost(model, **{**GIVEN, "held": held})
    assert cost is not None
    passed.clear()
    defense.check_images(model, task.image_size)
    checked = passed.total()  # The noise of the check, which passes again below, is no part of the cost.
    passed.clear()
    result = defense(task)
    return cost, (passed[True], passed[False] - checked), result, task


@pytest.mark.parametrize(("name", "options"), EXACT, ids=str)
def test_as_many_images_pass_as_it_says(name, options, passed) -> None:
    cost, counted, result, task = measure(passed, name, options)
    assert counted == (cost.trained, cost.predicted)
    if result.filter is None:
        assert cost.judged == 0
        return
    assert result.filter.judge is not None
    passed.clear()
    result.filter.judge(task.clean.images[:5])
    assert passed == {False: 5 * cost.judged}


@pytest.mark.parametrize(("name", "options"), FEWER, ids=str)
def test_at_most_as_many_images_pass_as_it_says(name, options, passed) -> None:
    cost, (trained, predicted), _, _ = measure(passed, name, options)
    assert trained <= cost.trained and predicted <= cost.predicted
    assert (trained, predicted) != (cost.trained, cost.predicted), "otherwise the case tests nothing"


@pytest.mark.parametrize(("name", "options"), MIXTURES, ids=str)
def test_as_many_images_pass_a_mixture_as_it_says(name, options, passed) -> None:
    """The defender holds 24 images, 12 of each of two tasks, and 24 marked ones."""
    defense, model = create_defense(name, **options), build_mixture()
    task, _ = make_mixture_task(model, tasks=[task_split(0, HELD // 2), task_split(1, HELD // 2)])
    cost = defense.cost(model, **GIVEN)
    assert cost is not None
    passed.clear()
    defense(task)
    assert (passed[True], passed[False]) == (cost.trained, cost.predicted)


def test_clp_passes_noise_without_going_backward(passed) -> None:
    """A graph is recorded to find which convolution is before which norm; nothing is trained."""
    cost, counted, _, _ = measure(passed, "clp", {"u": 1.0})
    assert cost == Cost(predicted=2) and sum(counted) == 2


@pytest.mark.parametrize(("inner", "sought"), [(2, 16), (4, 32), (6, 48)])
def test_steps_of_i_bau_without_images_count_as_two_passes(inner, sought, passed) -> None:
    """An epoch is 24 images in 3 batches of 8; each round seeks, and unlearns in one epoch."""
    options = {"rounds": 2, "inner_steps": inner, "fixed_point_steps": 3}
    cost, counted, _, _ = measure(passed, "i-bau", options)
    assert counted == (2 * (sought + 2 * HELD), 0)
    assert cost == Cost(trained=counted[0] + 2 * 2 * 3 * HELD)


def test_epochs_of_the_recipe_are_trained_where_none_are_given() -> None:
    """As `bench.running.plan` counts them; ABL leaves the isolated images out once, and uses them once."""
    images = Tiny().load()
    count = len(images.train)
    for name in ("spectral", "activation-clustering", "scan", "abl"):
        part = {"name": name, **({"clean_fraction": 0.5} if name == "scan" else {})}
        if name == "abl":
            part["ratio"] = 0.25
        spec = tiny_spec(defenses=[part], train={"epochs": 3})
        cost = defense_cost(spec, images, used_model())
        isolated = count // 4 if name == "abl" else 0
        assert cost is not None
        passes = Planned(spec, "missing").passes
        assert cost.trained == passes * count + isolated * (20 - 3), name
        assert passes == (4 if name == "abl" else 3)


@pytest.mark.parametrize("name", sorted(defenses.registry.names()))
def test_every_defense_states_its_cost(name) -> None:
    """Either of a pMoE or of a mixture; by `cost`, not by the options that an estimate falls back to."""
    defense = making.make("defense", name)
    for model in (used_model(), build_mixture()):
        try:
            defense.check_model(model)
        except ConfigError:
            continue
        assert defense.cost(model, **GIVEN) is not None
        return
    raise AssertionError("it can be applied to neither model")


class Idle(Defense):
    """Says nothing of its cost."""

    def defend(self, task: DefenseTask) -> DefenseResult:
        return DefenseResult("idle", task.model)


def test_without_epochs_the_cost_is_not_known() -> None:
    model = nn.Linear(1, 1)
    assert Idle().cost(model, **GIVEN) is None
    lasting = Idle()
    lasting.epochs = 3  # type: ignore[attr-defined]
    assert lasting.cost(model, **GIVEN) == Cost(trained=3 * HELD)
    lasting.needs = frozenset({"training-set", "clean"})  # type: ignore[misc]
    assert lasting.cost(model, **GIVEN) == Cost(trained=3 * TRAIN), "then on the training set"
    lasting.epochs = None  # type: ignore[attr-defined]
    assert lasting.cost(model, **GIVEN) == Cost(trained=RECIPE.epochs * TRAIN), "as often as the recipe says"


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
