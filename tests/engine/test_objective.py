"""Training with a loss of one's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from defense_tasks import CPU, changed, copies, held_images, used_model
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.step import TrainStep, make_optimizer
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.testing.expert_tasks import TinyMergeable

RECIPES = [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adamw", "lr": 0.01, "schedule": "one-cycle"},
]


def make_tuner(*, seed: int = 7, **recipe) -> Tuner:
    return Tuner(
        TrainSpec(**{"batch_size": 8, "lr": 0.05, **recipe}), seed, CPU, "fp32", Observer(), "tuning"
    )


def cross_entropy(model, images, labels):
    logits = model(images)
    return logits, F.cross_entropy(logits.float(), labels)


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
@pytest.mark.parametrize("head", [False, True], ids=["all", "head"])
def test_plain_cross_entropy_gives_the_same_weights_bit_for_bit(recipe, head) -> None:
    """The history is the same, too. The model is dense, since a routed one has losses of its own."""
    tuned = []
    for objective in (None, cross_entropy):
        model = used_model("wide_resnet")
        tune, modules = make_tuner(**recipe), [model.head] if head else None
        tune(model, held_images(), epochs=2, modules=modules, objective=objective)
        timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in tune.history]
        tuned.append((copies(model), timeless))
    assert not changed(tuned[0][0], tuned[1][0]) and tuned[0][1] == tuned[1][1]
    assert changed(copies(used_model("wide_resnet")), tuned[0][0])


@pytest.mark.parametrize(
    ("objective", "augment", "augmented"),
    [(None, None, True), (cross_entropy, None, False), (cross_entropy, True, True), (None, False, False)],
)
def test_only_an_objective_sees_the_images_as_they_are_unless_asked(objective, augment, augmented) -> None:
    """It may hold what it computed for the very images. Plain tuning augments as the victim's training does."""
    weights = []
    for recipe in ({}, {"augment": "crop-flip"}):
        model = used_model("wide_resnet")
        make_tuner(**recipe)(model, held_images(), epochs=1, objective=objective, augment=augment)
        weights.append(copies(model))
    assert bool(changed(*weights)) is augmented


def step_with(objective, labels, *, model: nn.Module | None = None) -> TrainStep:
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    split = Split(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels)
    return TrainStep(model, make_optimizer(model, TrainSpec(), CPU), split, CPU, "fp32", objective=objective)


def test_sums_are_of_the_objectives_loss_and_logits() -> None:
    """Batches of 2 and 1 images; the loss is the number of images plus 0.5: 2 * 2.5 + 1 * 1.5. Two of three hits."""
    logits = F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    answers = torch.tensor([0, 1, 0])

    def objective(model, images, labels):
        own = logits[: len(images)] if len(images) == 2 else logits[2:]
        return own, len(images) + 0.5 + 0 * model(images).sum()

    step = step_with(objective, answers)
    step(torch.tensor([0, 1]))
    step(torch.tensor([2]))
    assert step.loss_sum.item() == 6.5 and step.hits.item() == 2
    step.reset()
    assert step.loss_sum.item() == 0 == step.hits.item()


def test_labels_may_have_more_columns_and_the_first_is_what_counts() -> None:
    seen = []

    def objective(model, images, labels):
        seen.append(labels)
        logits = F.one_hot(torch.tensor([1, 1]), 3) + 0 * model(images)
        return logits, logits.sum()

    labels = torch.tensor([[1, 7], [2, 8]])
    step = step_with(objective, labels)
    step(torch.tensor([1, 0]))
    assert torch.equal(seen[0], labels.flip(0)) and step.hits.item() == 1


@pytest.mark.parametrize(
    "objective",
    [
        lambda model, images, labels: (
            model(images),
            F.cross_entropy(model(images), labels, reduction="none"),
        ),
        lambda model, images, labels: (model(images)[:1], model(images).sum()),
        lambda model, images, labels: (model(images).argmax(1), model(images).sum()),
        lambda model, images, labels: model(images).sum(),
        lambda model, images, labels: (model(images), 0.5),
    ],
    ids=["a loss for each image", "too few logits", "predictions", "the loss only", "a number"],
)
def test_wrong_shapes_are_the_authors_fault(objective) -> None:
    message = r"of an attack or defense: expected logits \(2, classes\) and a scalar loss, got (shapes|Tensor|tuple)"
    with pytest.raises(PluginError, match=message):
        step_with(objective, torch.tensor([0, 1]))(torch.arange(2))


def noisy(model, images, labels):
    """Cross-entropy on images with noise from torch's global generator."""
    logits = model(images + 0.5 * torch.rand(len(images), 1, 1, 1, device=images.device))
    return logits, F.cross_entropy(logits, labels)


def test_draws_depend_on_the_seed_and_the_epoch_only() -> None:
    tuned = []
    for seed, outside in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(outside)
        model = used_model("wide_resnet")
        make_tuner(seed=seed)(model, held_images(), epochs=1, objective=noisy)
        tuned.append(copies(model))
    assert not changed(tuned[0], tuned[1]) and changed(tuned[0], tuned[2])


def test_every_call_goes_through_the_images_in_an_order_of_its_own() -> None:
    """Batches of all 24 images, told apart by the sums of their pixels; a tuner made anew repeats its calls."""
    orders = []

    def objective(model, images, labels):
        orders.append(images.sum((1, 2, 3)).tolist())
        return cross_entropy(model, images, labels)

    for _ in range(2):
        tune, model = make_tuner(batch_size=24), nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
        tune(model, held_images(), epochs=1, lr=0.01, objective=objective)
        tune(model, held_images(), epochs=2, objective=objective)
    assert orders[:3] == orders[3:]
    assert len(set(map(tuple, orders))) == 3 and len({tuple(sorted(order)) for order in orders}) == 1
    assert [(row["epoch"], row["lr"]) for row in tune.history] == [(1, 0.01), (2, 0.05), (3, 0.05)]
    assert tune.images == 3 * 24 and not model.training


def test_each_epoch_draws_anew() -> None:
    drawn = []

    def objective(model, images, labels):
        drawn.append(torch.rand(()).item())
        return cross_entropy(model, images, labels)

    model = used_model("wide_resnet")
    make_tuner(batch_size=24)(model, held_images(), epochs=3, objective=objective)
    assert len(set(drawn)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_objective_draws_anew_at_every_replay() -> None:
    """The drawn numbers of 12 steps differ; and with a loss that does not draw, weights are those without a graph."""
    gpu = torch.device("cuda")
    drawn = torch.zeros(12, device=gpu)
    count = torch.zeros(1, dtype=torch.int64, device=gpu)

    def drawing(model, images, labels):
        drawn.index_copy_(0, count, torch.rand(1, device=gpu))
        count.add_(1)
        return cross_entropy(model, images, labels)

    split = held_images(96).to(gpu)
    weights = []
    for objective in (None, cross_entropy, drawing):
        torch.manual_seed(0)
        model = TinyMergeable().to(gpu)
        tuner = replace(make_tuner(optimizer="adamw", lr=0.01), device=gpu)
        tuner(model, split, epochs=1, objective=objective)
        weights.append(copies(model))
    assert len(drawn.unique()) == 12 and count.item() == 12
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
        torch.testing.assert_close(weights[2][name], value)


def test_inputs_are_floats_between_0_and_1() -> None:
    """What the objective is given is what a model is given without one."""
    seen = []

    def objective(model, images, labels):
        seen.append(images)
        return cross_entropy(model, images, labels)

    model, split = TinyMergeable(), held_images(4)
    step = TrainStep(model, make_optimizer(model, TrainSpec(), CPU), split, CPU, "fp32", objective=objective)
    step(torch.tensor([2, 0]))
    assert torch.equal(seen[0], split.images[[2, 0]].float() / 255)
    assert torch.equal(seen[0], as_input(split.images[[2, 0]]))
