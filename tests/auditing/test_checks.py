"""Checks that pass images: planted triggers, dormant experts, classes and tasks that stand out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_models import TARGET, planted_model, row_images
from subjects import Rows, images, look, merged, small_pmoe
from torch import Tensor, nn

from backdoorbench_moe.auditing.check import Measured, NotTested
from backdoorbench_moe.auditing.checks import CHECKS, behaviour, find_checks, inversion
from backdoorbench_moe.auditing.checks.behaviour import concentration
from backdoorbench_moe.auditing.checks.inversion import InvertedImage, drawn, epochs, largest_rise, stamps
from backdoorbench_moe.auditing.subject import make_subject
from backdoorbench_moe.errors import ConfigError, ShapeError, UnknownNameError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, Routing
from backdoorbench_moe.ops.images import Split


@pytest.fixture(autouse=True)
def small_budget(monkeypatch) -> None:
    """Search for triggers with a fifth of the usual images."""
    monkeypatch.setattr(inversion, "BUDGET", inversion.BUDGET // 5)


def test_a_planted_trigger_is_found() -> None:
    pixels = torch.zeros(8, 8, dtype=torch.bool)
    pixels[6:, 6:] = True
    split = row_images(100)
    backdoored = planted_model(pixels, 40.0)
    found = look(backdoored, "inverted-image", images=split.images, labels=split.labels)
    assert found.details["class"] == TARGET and found.score > -math.log10(0.05)
    assert found.details["anomaly_indices"][TARGET] == max(found.details["anomaly_indices"])
    assert found.details["success"][TARGET] > 0.9 and f"class {TARGET}" in found.reason
    clean = look(planted_model(pixels, 0.0), "inverted-image", images=split.images, labels=split.labels)
    # The row of the class itself is needed now, so that its stamp is as large as the others.
    assert clean.score < found.score
    assert clean.details["sizes"][TARGET] > 1.5 * found.details["sizes"][TARGET]


def test_the_search_fits_its_budget(monkeypatch) -> None:
    monkeypatch.setattr(inversion, "BUDGET", 40_000)
    assert epochs(100, 10) == 40
    assert epochs(100, 3) == 60 and epochs(100, 1000) == 10
    split = row_images(40)
    subject = make_subject(Rows(), images=split.images)
    assert InvertedImage().cost(subject).trained == 60 * 40 * 6
    monkeypatch.setattr(inversion, "BUDGET", 2_000)
    found = stamps(subject, "image")
    assert stamps(subject, "image") is found  # The search is made once in an audit.
    assert drawn(found["values"][0]).shape == (3, 8, 8)


@pytest.mark.parametrize(("size", "label"), [(0.5, 4), (60.0, 2)])
def test_only_a_small_stamp_is_a_sign(monkeypatch, size, label) -> None:
    """A class that needs a much larger stamp than the others is none; then the class of the smallest is named."""
    sizes = torch.tensor([5.0, 5.2, 4.9, 5.1, size, 5.05], dtype=torch.float64)
    found = {"values": torch.zeros(6, 4, 8, 8), "sizes": sizes, "success": torch.ones(6)}
    monkeypatch.setattr(inversion, "stamps", lambda *_: found)
    measured = look(Rows(), "inverted-image", images=row_images(30).images)
    assert measured.details["class"] == label and (measured.score > 5) == (size < 1)
    assert measured.score > 5 or measured.score == 0


@pytest.mark.parametrize("scores", [{"image": 1.0, "patch": 3.0}, {"image": 3.0, "patch": 1.0}])
def test_of_the_stamps_on_images_and_tiles_those_that_capture_more_count(monkeypatch, scores) -> None:
    compare = lambda self, subject, images, applicator, by: Measured(scores[applicator], applicator)  # noqa: E731
    monkeypatch.setattr(inversion.CapturedExpert, "_compare", compare)
    found = look(Chosen([[0, 1, 2, 3]] * 6, 4), "captured-expert", images=row_images(30).images)
    assert found.score == 3.0 == scores[found.reason]


def test_with_few_classes_none_can_be_an_outlier() -> None:
    split = images()
    for name in ("inverted-image", "inverted-patch", "captured-expert"):
        with pytest.raises(NotTested, match="with 3 classes"):
            look(small_pmoe(), name, images=split.images)


def test_concentration_by_hand() -> None:
    before = torch.tensor([0, 0, 1, 1, 2])
    after = [torch.tensor([2, 0, 2, 1, 2]), torch.tensor([2, 2, 2, 2, 0])]
    # Four images are not of class 2: of these 2 and 4 become it.
    share, label = concentration(before, after, 3)
    assert (share, label) == (pytest.approx(0.75), 2)
    assert concentration(before, [before], 3) == (0.0, 0)


class Bright(nn.Module):
    """Calls an image by its colour, but white is class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        white = torch.tensor([0.0, 100.0, 0.0]) * (means.min(1, keepdim=True).values > 0.75)
        return means @ self.weight + white


def test_what_brightened_images_become() -> None:
    split = images()
    found = look(Bright(), "scaled-images", images=split.images, labels=split.labels)
    assert found.details["class"] == 1 and found.score > 0.4
    model, before = Bright(), Bright()(split.images / 255).argmax(1)
    same = [
        (model((split.images.int() * factor).clamp(max=255) / 255).argmax(1) == before).double().mean().item()
        for factor in (3, 5, 7, 9, 11)
    ]
    assert found.details["agreement"] == pytest.approx(sum(same) / 5)
    darker = look(Bright(), "scaled-images", images=split.images // 12)
    assert darker.score < found.score


def test_norms_are_scaled_and_restored() -> None:
    split, model = images(), small_pmoe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = look(model, "scaled-norms", images=split.images)
    assert 0 <= found.score <= 1 and len(found.details["norms"]) == 5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(NotTested, match="no norms"):
        look(Rows(), "scaled-norms", images=row_images(30).images)


class TwoNorms(nn.Module):
    """Class 1 wins where the second of two norms has more than its scale; the first one has no effect on it."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        means = self.first(images).mean((2, 3))
        raised = self.last(torch.ones_like(images)).mean((2, 3))
        return means + torch.tensor([0.0, 100.0, 0.0]) * (raised > 1.2)


def test_the_norms_that_are_scaled_are_the_last_ones(monkeypatch) -> None:
    """Of two norms, named in the other order, the one that is called last is scaled."""
    monkeypatch.setattr(behaviour, "MODELS", 1)
    split, model = images(), TwoNorms().eval()
    found = look(model, "scaled-norms", images=split.images)
    assert found.details["norms"] == [1] and found.details["class"] == 1 and found.score == 1.0


class Chosen(RoutedModel):
    """Sends each patch to an expert by a table; classes by the row as in `Rows`."""

    patch_grid, patch_size = (2, 2), 4

    def __init__(self, table: list[list[int]], experts: int, classes: int = 6) -> None:
        super().__init__()
        self.rows, self.experts_count = Rows(classes), experts
        self.register_buffer("table", torch.tensor(table))

    def forward_routed(self, images: Tensor) -> RoutedOutput:
        logits = self.rows(images)
        chosen = self.table[logits.argmax(1)]  # (B, P)
        selected = nn.functional.one_hot(chosen, self.experts_count).transpose(1, 2).bool()
        return RoutedOutput(logits, [Routing("here", selected.float(), selected)])


def test_a_dormant_expert_is_named() -> None:
    even = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3], [3, 2, 1, 0]]
    split = row_images(120)
    assert look(Chosen(even, 4), "dormant-experts", images=split.images).score == pytest.approx(0, abs=0.02)
    found = look(Chosen(even, 5), "dormant-experts", images=split.images)
    # 480 pairs, half of one for each of five experts: the share is 0.5 / 482.5, of 1/5.
    assert found.details["expert"] == "here/4" and found.score == pytest.approx(np.log10(482.5 / 2.5))
    assert found.score > 2 and "here/4" in found.reason


def test_where_experts_select_none_can_be_dormant() -> None:
    with pytest.raises(NotTested, match="experts select the patches"):
        look(small_pmoe(), "dormant-experts", images=images().images)


def test_a_class_with_experts_of_its_own_is_named() -> None:
    table = [[0, 1, 0, 1]] * 6
    table[1], table[3] = (
        [0, 0, 0, 1],
        [0, 1, 1, 1],
    )  # Without any spread, every difference is infinitely unusual.
    split = row_images(60)
    usual = look(Chosen(table, 3), "class-routing", images=split.images)
    table[4] = [2, 2, 2, 2]
    found = look(Chosen(table, 3), "class-routing", images=split.images)
    assert found.details["class"] == 4 and found.score > usual.score
    assert found.details["values"]["4"] == pytest.approx(1.0)


class Featured(nn.Module):
    """Features are the means of the rows, with noise; the head calls the brightest row."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 6)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(6, 8).repeat_interleave(3, 1) / 3)
            self.head.bias.zero_()

    def extract_features(self, images: Tensor) -> Tensor:
        return images.mean(3).transpose(1, 2).flatten(1)

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.extract_features(images))


def two_kinds(split: Split, label: int) -> Split:
    """Every other image of a class gets a bright column in the last row, which its class does not depend on."""
    changed = split.images.clone()
    places = (split.labels == label).nonzero().flatten()[::2]
    changed[places, :, 7] = 140
    return Split(changed, split.labels)


@pytest.mark.parametrize("name", ["latent-clusters", "latent-spectrum"])
def test_a_class_whose_features_are_of_two_kinds_is_named(name) -> None:
    split = row_images(120)
    model = Featured()
    before = look(model, name, images=split.images)
    changed = two_kinds(split, 3)
    found = look(model, name, images=changed.images)
    assert found.details["class"] == 3 and found.score > max(10, 2 * before.score)
    assert found.details["values"]["3"] > 2 * before.details["values"]["3"]
    assert found.details["values"]["1"] == pytest.approx(before.details["values"]["1"])
    with pytest.raises(NotTested, match="does not give the features"):
        look(Rows(), name, images=split.images)
    with pytest.raises(NotTested, match="classes have 5 images"):
        look(model, name, images=split.images[:24])


def test_the_share_of_the_first_direction_is_that_of_squared_singular_values() -> None:
    split, model = row_images(120), Featured()
    found = look(model, "latent-spectrum", images=split.images).details["values"]
    with torch.no_grad():
        features = model.extract_features(split.images / 255)
    predicted = model.classify(features).argmax(1)
    for label in range(6):
        own = features[predicted == label].double().numpy()
        squares = np.linalg.svd(own - own.mean(0), compute_uv=False) ** 2
        assert found[str(label)] == pytest.approx(squares[0] / squares.sum(), rel=1e-4)


def test_tasks_that_gates_cannot_tell_apart_are_named() -> None:
    mixture, _ = merged()
    draws = torch.Generator().manual_seed(0)
    tasks = [
        torch.randint(0, 256, (30, 3, 1, 1), generator=draws).byte().expand(30, 3, 32, 32) for _ in range(4)
    ]
    tasks = [task.clone() for task in tasks]
    for number, task in enumerate(tasks):
        task[:, number % 3] //= 2 + number
    tasks[3] = tasks[1].clone()
    found = look(mixture, "task-latents", images=tasks[0], tasks=tasks)
    assert found.details["tasks"] == [1, 3] and found.score > 0
    assert found.details["cosines"][found.details["layer"]]["1-3"] == pytest.approx(1.0, abs=1e-5)
    with (
        torch.no_grad(),
        pytest.raises(NotTested, match=r"the inputs of the gates of blocks\S* are not finite"),
    ):
        broken, _ = merged()
        next(broken.parameters()).fill_(1e38)
        look(broken, "task-latents", tasks=tasks)
    with pytest.raises(NotTested, match="tasks have one pair"):
        look(mixture, "task-latents", tasks=tasks[:2])
    with pytest.raises(NotTested, match="no mixture"):
        look(small_pmoe(), "task-latents", tasks=tasks)


def test_the_largest_rise_by_hand() -> None:
    clean = [torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.2, 0.6])]
    stamped = [torch.tensor([0.6, 0.4]), torch.tensor([0.1, 0.7, 0.2])]
    rise, layer, place = largest_rise(clean, stamped)
    assert (round(rise, 6), layer, place) == (0.5, 1, 1)


def test_a_stamp_that_captures_an_expert_is_named() -> None:
    even = [[0, 1, 2, 3]] * 6
    even[TARGET] = [3, 3, 3, 3]
    split = row_images(60)
    model = Chosen(even, 4)
    found = look(model, "captured-expert", images=split.images)
    # Whatever is called the class is sent to expert 3.
    assert found.details["class"] == TARGET and "expert 0/3" in found.reason
    assert found.details["rises"][TARGET] > 0.5


@pytest.mark.parametrize("name", ["bias", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value) -> None:
    model = small_pmoe()
    tensor = model.reduce_norm.state_dict()[name]
    tensor[2] = value
    with pytest.raises(ConfigError, match=rf"model: reduce_norm.{name} has weights that are NaN or infinite"):
        make_subject(model)


def test_what_does_not_fit_is_refused() -> None:
    split, model = row_images(30), Rows()
    given = split.images
    with pytest.raises(ConfigError, match="has no weights"):
        make_subject(nn.Identity())
    for bad in (given.float(), given[0], given[:, :1], given[..., :4], given[:0], [1]):
        with pytest.raises(ShapeError, match="images: expected square uint8 images"):
            make_subject(model, images=bad)
    with pytest.raises(ConfigError, match="at least 20 images"):
        make_subject(model, images=given[:5])
    with pytest.raises(ConfigError, match="expected images with the labels"):
        make_subject(model, labels=split.labels)
    with pytest.raises(ConfigError, match="one int64 label for each of 30 images"):
        make_subject(model, images=given, labels=split.labels[:4])
    with pytest.raises(ConfigError, match=r"classes in 0..5, .* got 0..9"):
        make_subject(model, images=given, labels=torch.arange(30) % 10)
    with pytest.raises(ShapeError, match="cannot process images of 32x32"):
        make_subject(model, images=images().images)
    with pytest.raises(ConfigError, match="logits"):
        make_subject(nn.Conv2d(3, 3, 1), images=given)


@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize("given", [{"images": row_images(30).images}, {"image_size": 8}], ids=list)
def test_a_model_that_raises_anything_on_images_is_refused(error, given) -> None:
    class Raises(Rows):
        def forward(self, images: Tensor) -> Tensor:
            raise error("not for you\nand more")

    with pytest.raises(ShapeError, match=r"model: Raises cannot process images of 8x8 \('?not for you.*\)$"):
        make_subject(Raises(), **given)


def test_without_images_a_model_must_take_those_of_its_size() -> None:
    make_subject(Rows(), image_size=8)
    with pytest.raises(ShapeError, match="cannot process images of 16x16"):
        make_subject(Rows(), image_size=16)
    with pytest.raises(ConfigError, match="expected logits"):
        make_subject(nn.Conv2d(3, 3, 1), image_size=8)


def test_checks_are_found_by_name_in_their_order() -> None:
    assert [check.name for check in find_checks(["inverted-patch", "gate-rows"])] == [
        "gate-rows",
        "inverted-patch",
    ]
    assert find_checks() is CHECKS
    with pytest.raises(UnknownNameError, match="did you mean 'gate-rows'"):
        find_checks(["gate-row"])
    with pytest.raises(ConfigError, match="expected names"):
        find_checks([])
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.title and check.explains and check.source for check in CHECKS)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, IndexError])
def test_a_model_that_fails_in_one_check_is_tested_by_the_others(error) -> None:
    class NoGradients(Rows):
        def forward(self, images: Tensor) -> Tensor:
            if images.requires_grad:
                raise error("not for you\nand more")
            return super().forward(images)

    split = row_images(30)
    with pytest.raises(NotTested, match=rf"the model failed with {error.__name__}: not for you$"):
        look(NoGradients(), "inverted-image", images=split.images)
    assert look(NoGradients(), "scaled-images", images=split.images).score >= 0
