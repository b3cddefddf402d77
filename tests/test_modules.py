"""Modules that are no runs, and weights made elsewhere, from Python."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TINY_MODEL, Tiny
from torch import nn

import backdoorbench_moe as bbmoe
from backdoorbench_moe import models
from backdoorbench_moe.engine.opening.opened_model import open_model
from backdoorbench_moe.errors import BbmoeError, ConfigError
from backdoorbench_moe.moe.routed import RoutedOutput

OPTIONS = {key: value for key, value in TINY_MODEL.items() if key != "name"}


class Plain(nn.Module):
    """A network that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture(scope="module")
def split():
    return Tiny().load().test


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options"), [("fine-tuning", {"epochs": 1}), ("clp", {"u": 2.0}), ("strip", {})]
)
def test_any_module_is_defended_and_stays_as_it_is(name, options, plain, split) -> None:
    before = copy.deepcopy(plain.state_dict())
    found = bbmoe.defend(plain, name, images=split.images, labels=split.labels, device="cpu", **options)
    assert unchanged(plain, before) and plain.training
    assert found.stages[0].name == "before" and found.model is found.stages[-1].model
    called = found.model(split.images.float() / 255).argmax(1)
    assert found.value("ba") == pytest.approx(100 * float((called == split.labels).double().mean()))


@pytest.mark.parametrize(
    ("name", "reason"), [("spectral", "extract_features"), ("fst", "components"), ("rasa", "marked")]
)
def test_a_defense_says_what_a_module_lacks(name, reason, plain, split) -> None:
    with pytest.raises(ConfigError, match=reason):
        bbmoe.defend(plain, name, images=split.images, labels=split.labels, device="cpu")


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("strip", 10, "10 of 3 classes; .* too few to set a threshold"),
        ("scale-up", 10, "10 of 3 classes, which are too few to set a threshold"),
        ("anp", 1, "expected at least 2 labelled images, got 1"),
    ],
)
def test_too_few_images_for_a_defense_are_refused(name, count, message, plain, split) -> None:
    with pytest.raises(ConfigError, match=f"^images: {message}[^\n]*$"):
        bbmoe.defend(plain, name, images=split.images[:count], labels=split.labels[:count], device="cpu")


def test_a_routed_module_is_analysed_without_a_trigger(split) -> None:
    torch.manual_seed(0)
    model = bbmoe.create_model("pmoe", num_classes=3, **OPTIONS)
    found = bbmoe.analyze(model, images=split.images, labels=split.labels, device="cpu")
    assert int(found.predicted.sum()) == found.images == 60 and found.ba.n == 60
    assert len(found.routing) == len(found.pixels) == 1 and found.routing[0].frequency.shape == (4, 64)
    assert set(found.muted) == {f"moe/{e}" for e in range(4)}
    hits = sum(found.class_ba[c].value * found.class_ba[c].n for c in found.class_ba)
    assert hits / 60 == pytest.approx(found.ba.value)
    without = bbmoe.analyze(model, images=split.images, device="cpu")
    assert without.ba is None and without.muted is None and without.routing


def test_a_dense_module_is_analysed(plain, split) -> None:
    found = bbmoe.analyze(
        plain, images=(split.images.float() / 255).numpy(), labels=split.labels.tolist(), device="cpu"
    )
    assert found.routing == () and found.muted is None and found.ba is not None


class Duck(nn.Module):
    """Reports its routing, but does not say so by its base class."""

    def __init__(self, num_classes: int = 3, image_size: int = 32) -> None:
        super().__init__()
        self.plain = Plain()

    def forward_routed(self, images: torch.Tensor) -> RoutedOutput:
        """Logits and no layers."""
        return RoutedOutput(self.plain(images), [])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.forward_routed(images).logits


DUCK = "Duck has forward_routed, but is not a RoutedModel: derive it from backdoorbench_moe.RoutedModel"


@pytest.mark.parametrize(
    "use",
    [
        bbmoe.analyze,
        bbmoe.audit,
        lambda model, **given: bbmoe.defend(model, "expert-drop", **given),
        lambda model, **given: bbmoe.defend(bbmoe.normalised(model, "half", image_size=32), "strip", **given),
        lambda model, **given: bbmoe.try_trigger(model, "square", "image", **given),
    ],
)
def test_a_routed_module_without_the_base_class_does_not_pass_for_a_dense_one(use, split) -> None:
    with pytest.raises(ConfigError, match=f"^model: {DUCK}[^\n]*$"):
        use(Duck(), images=split.images, labels=split.labels, device="cpu")


def test_a_routed_model_without_the_base_class_is_not_registered() -> None:
    with pytest.raises(ConfigError, match=f"^model 'duck': {DUCK}"):
        models.registry.register("duck")(Duck)


class Brightest(nn.Module):
    """Calls an image by its brightest colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return images.mean((2, 3))


def test_a_trigger_that_nobody_trained_is_tried(split) -> None:
    square = {"name": "square", "size": 26, "colour": "#0000ff", "position": "upper-left"}
    given = {"images": split.images, "labels": split.labels, "device": "cpu"}
    found = bbmoe.try_trigger(Brightest(), square, "image", **given)
    stamped = split.images.clone()
    stamped[..., :26, :26] = torch.tensor([0, 0, 255]).view(3, 1, 1)
    before, after = (images.float().mean((2, 3)).argmax(1) for images in (split.images, stamped))
    assert found.ba["value"] == pytest.approx(100 * float((before == split.labels).double().mean()))
    assert found.ra["value"] == pytest.approx(100 * float((after == split.labels).double().mean()))
    assert found.ra["value"] < found.ba["value"] and found.strongest == 2
    for number, rate in enumerate(found.classes):
        others = split.labels != number
        assert rate.asr["value"] == pytest.approx(100 * float((after[others] == number).double().mean()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trigger": "wrap"}, "did you mean 'warp'"),
        ({"trigger": {"name": "square", "sise": 3}}, "unknown 'sise'"),
        ({"images": None}, "images: expected clean images"),
        ({"labels": None}, "labels: expected the classes"),
        ({"model": 7}, "model: expected a Run"),
    ],
)
def test_what_cannot_be_tried(given, message, plain, split) -> None:
    values = {"model": plain, "trigger": "square", "images": split.images, "labels": split.labels, **given}
    with pytest.raises(BbmoeError, match=message):
        bbmoe.try_trigger(**values, device="cpu")


def test_a_normalisation_is_put_into_a_copy(plain) -> None:
    images = torch.rand(2, 3, 16, 16)
    inside = bbmoe.normalised(plain, "half", image_size=16).eval()
    plain.eval()
    with torch.no_grad():
        assert torch.allclose(inside(images), plain((images - 0.5) / 0.5), atol=1e-6)
        assert not torch.allclose(inside(images), plain(images))
    assert type(plain) is Plain
    plain.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "images: expected clean images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "labels: expected the classes"),
        ({"images": torch.full((2, 3, 8, 8), 2.0)}, r"expected floats in \[0, 1\]"),
        ({"images": torch.zeros(2, 1, 8, 8), "labels": [0, 1]}, "does not take images|expected shape"),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": [0, 3]}, r"classes in 0..2"),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": [0]}, "expected 2 integers"),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": [0.5, 1.0]}, "expected 2 integers"),
    ],
)
def test_what_a_module_cannot_be_defended_with_is_refused(given, message, plain) -> None:
    with pytest.raises(BbmoeError, match=message):
        bbmoe.defend(plain, "fine-tuning", epochs=1, device="cpu", **given)


def test_a_module_without_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected logits \(B, classes\)"):
        open_model(nn.Conv2d(3, 4, 1), image_size=8)


def test_a_folder_of_images_is_read_with_the_labels_of_its_classes(tmp_path) -> None:
    from PIL import Image

    [run] = bbmoe.attack(
        model=TINY_MODEL, dataset="tiny", trigger="square", applicator="image", train={"epochs": 1},
        precision="fp32", twin=False, output=tmp_path / "runs", device="cpu", recipe="paper",
    )  # fmt: skip
    for name in ("green", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 32)).save(tmp_path / "images" / name / f"{number}.png")
    opened = open_model(run, images=tmp_path / "images")
    assert opened.images.shape == (4, 3, 32, 32) and sorted(opened.labels.tolist()) == [1, 1, 2, 2]
    assert opened.run is run and opened.classes == ("red", "green", "blue")
    whole = open_model(run.folder.path)
    assert torch.equal(whole.images, Tiny().load().test.images) and whole.split is not None
    assert open_model(run, with_data=False).images is None
