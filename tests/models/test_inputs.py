"""Normalisation and resizing inside a model: every way in prepares the images once, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models import create_model, registry
from backdoorbench_moe.models.common import NORMALISATIONS
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import WithExperts, WithFeatures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TINY = {
    "pmoe": {"widen_factor": 1, "moe_channels": 16, "expert_channels": 8, "top_k": 6, "gate_std": 1.0},
    "wide_resnet": {"widen_factor": 1},
    "timm:test_vit": {},
    "convnext": {"depths": (1, 1), "dims": (16, 16)},
}


def made(name: str, size: int = 32, **options: object) -> nn.Module:
    torch.manual_seed(3)
    tiny = TINY[name] if name != "convnext" else dict(registry.lookup(name).tiny)
    return create_model(name, num_classes=4, image_size=size, **tiny, **options).eval()


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    return (images - mean) / std


@pytest.mark.parametrize("name", TINY)
def test_every_way_in_prepares_the_images_once(name) -> None:
    plain, model = made(name), made(name, mean=MEAN, std=STD)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        wanted = plain(normalised(images))
        assert torch.allclose(model(images), wanted, atol=1e-5)
        assert not torch.allclose(plain(images), wanted, atol=1e-3)
        if isinstance(model, WithFeatures):
            assert torch.allclose(model.classify(model.extract_features(images)), wanted, atol=1e-5)
        if isinstance(model, RoutedModel):
            assert torch.allclose(model.forward_routed(images).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_state_dict_the_protocols_and_the_class_stay(name) -> None:
    plain, model = made(name), made(name, mean="imagenet", resize=64)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert isinstance(model, WithExperts) == isinstance(plain, WithExperts)
    images = torch.rand(2, 3, 32, 32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.5)
        assert not torch.equal(twin(images), model(images))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize(("size", "resize"), [(32, 64), (64, 32), (32, 48), (48, 32)])
def test_resizing_is_that_of_torch(size, resize) -> None:
    plain, model = made("wide_resnet", resize), made("wide_resnet", size, resize=resize)
    images = torch.rand(2, 3, size, size)
    small = F.interpolate(images, (resize, resize), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.allclose(model(images), plain(small), atol=1e-5)


def test_gradients_reach_the_images_through_both() -> None:
    model = made("wide_resnet", resize=64, mean="cifar10")
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    model(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_an_error_inside_does_not_leave_the_model_unprepared() -> None:
    model, images = made("wide_resnet", mean=MEAN, std=STD), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 3, 32))
        assert torch.equal(model(images), before)


def test_patches_of_a_routed_model_are_pixels_of_the_images() -> None:
    model = made("pmoe", resize=64)
    assert (model.patch_size, model.patch_grid) == (2, (16, 16))
    with pytest.raises(ConfigError, match=r"whole pixels of the 32x32 images, got 48, .* is 2.66667"):
        made("pmoe", resize=48)
    assert (
        made("timm:test_vit", resize=160).patch_size is None
        or 32 % made("timm:test_vit", resize=160).patch_size == 0
    )


def test_names_stand_for_mean_and_standard_deviation() -> None:
    images = torch.rand(2, 3, 32, 32)
    mean, std = NORMALISATIONS["gtsrb"]
    with torch.no_grad():
        wanted = made("wide_resnet", mean=mean, std=list(std))(images)
        for options in ({"mean": "gtsrb"}, {"std": "gtsrb"}, {"mean": "gtsrb", "std": "gtsrb"}):
            assert torch.equal(made("wide_resnet", **options)(images), wanted)
        assert torch.allclose(
            made("wide_resnet", mean="none")(images), made("wide_resnet")(images), atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "imagnet"}, "did you mean 'imagenet'"),
        ({"mean": [0.5, 0.5, 0.5]}, "model.std: expected three numbers"),
        ({"std": [0.5, 0.5, 0.5]}, "model.mean: expected three numbers"),
        ({"mean": [0, 0, 0], "std": [1, 0, 1]}, "model.std: expected numbers above 0"),
        ({"mean": [0, 0], "std": [1, 1, 1]}, "mean: expected"),
        ({"mean": [120, 120, 120], "std": [60, 60, 60]}, r"model.mean: expected means of pixels in \[0, 1\]"),
        ({"resize": 0}, "model.resize: expected 1 to 8192"),
        ({"head": "old"}, "unknown 'old'"),
        ({"resiez": 3}, "did you mean 'resize'"),
    ],
)
def test_what_cannot_be_is_refused(options, message) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        made("wide_resnet", **options)


def test_a_model_with_an_option_of_the_same_name_keeps_it() -> None:
    class Own(nn.Module):
        def __init__(self, *, num_classes: int = 10, image_size: int = 32, mean: int = 1) -> None:
            super().__init__()
            self.mean = mean

    registry.register("own-mean")(Own)
    try:
        assert create_model("own-mean", mean=7).mean == 7
        assert registry.common("own-mean", {"mean": 7, "resize": 16}).mean is None
        assert registry.options("own-mean")["mean"].annotation is int
    finally:
        registry.unregister("own-mean")
