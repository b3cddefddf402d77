"""Anti-Backdoor Learning: its losses by hand, what is isolated, and the three trainings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from defense_tasks import make_task, used_model
from torch import Tensor, nn

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.abl import ascent, limited_loss
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing

SMALL = {"isolation_epochs": 2, "epochs": 3, "unlearning_epochs": 4, "ratio": 0.25}


class Logit(nn.Module):
    """Two classes, whose logits are the value of the first pixel times a weight, and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2) logits."""
        first = self.weight * images[:, 0, 0, 0]
        return torch.stack([first, torch.zeros_like(first)], 1)


def images_with(*losses: float) -> tuple[Tensor, Tensor]:
    """Images whose cross-entropy with the label 0 is given: log(1 + exp(-x)) = loss."""
    pixels = torch.tensor([-math.log(math.expm1(loss)) for loss in losses])
    return pixels.view(-1, 1, 1, 1), torch.zeros(len(losses), dtype=torch.int64)


@pytest.mark.parametrize(("losses", "value"), [((0.3, 0.5), 0.6), ((0.6, 1.0), 0.8), ((0.2, 0.8), 0.5)])
def test_flooding_by_hand(losses, value) -> None:
    """|0.4 - 0.5| + 0.5 = 0.6, |0.8 - 0.5| + 0.5 = 0.8, and 0.5 at 0.5."""
    _, loss = limited_loss("flooding", 0.5)(Logit(), *images_with(*losses))
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_below_gamma_both_losses_climb_one_for_the_batch_and_one_for_each_image() -> None:
    """The mean of 0.2 and 0.4 is below 0.5. Of 0.2 and 0.9 it is above, but one image is below: (0.9 - 0.2) / 2."""

    def slope(objective, *losses: float) -> float:
        model = Logit()
        objective(model, *images_with(*losses))[1].backward()
        return model.weight.grad.item()

    usual = lambda model, images, labels: (None, nn.functional.cross_entropy(model(images), labels))  # noqa: E731
    for isolation in ("flooding", "local-gradient-ascent"):
        objective = limited_loss(isolation, 0.5)
        assert slope(objective, 0.2, 0.4) == pytest.approx(-slope(usual, 0.2, 0.4))
        assert slope(objective, 0.7, 0.9) == pytest.approx(slope(usual, 0.7, 0.9))
    assert slope(limited_loss("flooding", 0.5), 0.2, 0.9) == pytest.approx(slope(usual, 0.2, 0.9))
    each = limited_loss("local-gradient-ascent", 0.5)
    assert slope(each, 0.2, 0.9) == pytest.approx((slope(usual, 0.9) - slope(usual, 0.2)) / 2)
    assert each(Logit(), *images_with(0.2, 0.9))[1].item() == pytest.approx(0.35)
    assert slope(ascent, 0.2, 0.9) == pytest.approx(-slope(usual, 0.2, 0.9))


def test_auxiliary_losses_of_routed_layers_are_added_but_not_unlearned() -> None:
    class Routed(RoutedModel):
        def __init__(self) -> None:
            super().__init__()
            self.logit = Logit()

        def forward_routed(self, images: Tensor) -> RoutedOutput:
            """Two layers, one of them with a loss."""
            gates = torch.ones(len(images), 1, 1)
            routing = [Routing("a", gates, gates > 0, torch.tensor(2.0)), Routing("b", gates, gates > 0)]
            return RoutedOutput(self.logit(images), routing)

    batch = images_with(0.3, 0.5)
    assert limited_loss("flooding", 0.5)(Routed(), *batch)[1].item() == pytest.approx(2.6, abs=1e-6)
    assert ascent(Routed(), *batch)[1].item() == pytest.approx(-0.4, abs=1e-6)


class Trainings:
    """Stands for `Tune`: keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __call__(self, model: nn.Module, split, **options: object) -> None:
        self.calls.append({"images": split.images.flatten(1).tolist(), "model": model, **options})


@pytest.fixture
def done():
    model, tune = used_model(), Trainings()
    task, reported = make_task(model, epochs=9)
    # The loss of an image is its place, but for the last twelve, which are learned best.
    places = {tuple(row): place for place, row in enumerate(task.training_set.images.flatten(1).tolist())}
    losses = lambda _, split: torch.tensor(  # noqa: E731
        [
            float(places[tuple(row)] % 36) - 40 * (places[tuple(row)] >= 36)
            for row in split.images.flatten(1).tolist()
        ]
    )
    task = replace(task, tune=tune, granted={**task.granted, "losses": losses})
    return task, tune, reported, places, model


def test_three_trainings_of_a_new_model(done) -> None:
    task, tune, reported, places, given = done
    result = create_defense("abl", **SMALL)(task)
    isolate, train, unlearn = tune.calls
    shown = [{places[tuple(row)] for row in call["images"]} for call in tune.calls]
    assert shown == [set(range(48)), set(range(36)), set(range(36, 48))]
    assert [call["epochs"] for call in tune.calls] == [2, 3, 4]
    assert (isolate.get("lr"), train.get("lr"), unlearn["lr"]) == (None, None, 5e-4)
    assert train.get("objective") is None and unlearn["objective"] is ascent
    models = {id(call["model"]) for call in tune.calls} | {id(result.model)}
    assert len(models) == 1 and id(given) not in models
    assert [stage for stage, _ in reported] == ["tuned"] and result.stage == "unlearned"
    [judgement] = result.judgements
    assert judgement.suspicious.tolist() == list(range(36, 48))
    assert judgement.scores[36:].min() > judgement.scores[:36].max(), "the lowest loss is the most suspicious"


def test_the_images_of_all_three_trainings_are_augmented_as_the_recipe_says(done) -> None:
    """`Tune` augments by default, but not for an objective."""
    task, tune, *_ = done
    create_defense("abl", **SMALL)(task)
    said = [(call.get("augment"), call.get("objective")) for call in tune.calls]
    assert [objective is None if augment is None else augment for augment, objective in said] == [True] * 3


def test_of_a_last_batch_of_one_isolated_image_the_least_suspicious_image_is_not_unlearned(done) -> None:
    """13 images in batches of 12: the twelve that are learned best, and image 0, which has the highest loss of them."""
    task, tune, _, places, _ = done
    task = replace(task, train=replace(task.train, batch_size=12))
    create_defense("abl", **{**SMALL, "ratio": 0.28})(task)
    assert {places[tuple(row)] for row in tune.calls[-1]["images"]} == set(range(36, 48))


def test_without_epochs_it_trains_as_long_as_the_run(done) -> None:
    task, tune, *_ = done
    task = replace(task, train=replace(task.train, epochs=39))
    create_defense("abl", ratio=0.25)(task)
    assert [call["epochs"] for call in tune.calls] == [3, 39, 20], "and a tenth of that to isolate"


class Linear(nn.Module):
    """A linear classifier of three classes, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3) logits."""
        return self.head(images.flatten(1) - 0.5)


@pytest.mark.parametrize("isolation", ["flooding", "local-gradient-ascent"])
def test_planted_images_are_isolated(isolation) -> None:
    """Noise without any rule, and a white stripe that always has the label 0, which is learned first."""
    task, _ = make_task(used_model(), lr=0.003)
    split, draws = task.training_set, torch.Generator().manual_seed(4)
    split.images.random_(256, generator=draws)
    split.labels.random_(3, generator=draws)
    split.images[5:17, :, 4:8], split.labels[5:17] = 255, 0
    options = {
        "isolation_epochs": 4,
        "epochs": 1,
        "unlearning_epochs": 10,
        "ratio": 0.25,
        "unlearning_lr": 0.01,
    }
    result = create_defense("abl", isolation=isolation, **options)(replace(task, fresh=Linear))
    assert result.judgements[0].suspicious.tolist() == list(range(5, 17))
    stripe = torch.full((1, 3, 32, 32), 0.5)
    stripe[:, :, 4:8] = 1
    assert result.model(stripe).argmax().item() != 0, "and unlearned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma: expected a positive number"),
        ({"ratio": 1.0}, r"ratio: expected a number in \(0, 1\)"),
        ({"isolation_epochs": 0}, "isolation_epochs: expected an integer of at least 1"),
        ({"unlearning_epochs": 0}, "unlearning_epochs: expected an integer of at least 1"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"unlearning_lr": -1.0}, "unlearning_lr: expected a positive number"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_defense("abl", **options)


@pytest.mark.parametrize(("ratio", "isolated"), [(0.01, 0), (0.03, 1), (0.99, 47)])
def test_a_ratio_that_leaves_nothing_to_train_on_is_refused(ratio: float, isolated: int) -> None:
    """Batch norms cannot be trained on a single image."""
    message = (
        rf"ratio: {ratio} of 48 images isolates {isolated} and leaves {48 - isolated}; expected at least 2"
    )
    with pytest.raises(ConfigError, match=message):
        create_defense("abl", ratio=ratio).count(48, 2)
    assert create_defense("abl", ratio=0.05).count(48, 2) == 0
