"""The architectures of BackdoorBench: weights fit by name and shape, and mean what they mean there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.engine.weights.fitting import fit_weights
from backdoorbench_moe.engine.weights.reading import Weights
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.models import create_model

CLASSES = 7


def build(name: str, side: int = 32) -> nn.Module:
    return create_model(f"backdoorbench:{name}", num_classes=CLASSES, image_size=side).eval()


def fit(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    return fit_weights(model, Weights(Path("attack_result.pt"), weights, {}))


@pytest.mark.parametrize(
    ("name", "side", "last"),
    [("googlenet", 32, "inception5b.branch4.1.conv"), ("inception_v3", 75, "Mixed_7c.branch_pool.conv")],
)
def test_networks_with_auxiliary_classifiers_are_those_of_torchvision(name, side, last) -> None:
    images = torch.rand(4, 3, side, side)
    model = build(name, side)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # Statistics of these images, so that activations do not vanish.
    with torch.no_grad():
        assert model.train()(images).shape == (4, CLASSES)
    theirs = getattr(torchvision.models, name)(num_classes=CLASSES, init_weights=False).eval()
    theirs.load_state_dict({model.their_name(key): tensor for key, tensor in model.state_dict().items()})
    other = build(name, side)
    assert fit(other, theirs.state_dict()) == ()
    with torch.no_grad():
        expected = theirs(images)
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        assert torch.allclose(other(images), expected, rtol=1e-4, atol=1e-5)
    [group] = model.prunable()["trunk"]
    assert group.layer is model.get_submodule(f"trunk.{last}")


def batch_norm(weights: Mapping[str, Tensor], name: str, maps: Tensor) -> Tensor:
    mean, var, scale, shift = (
        weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(maps, mean, var, scale, shift)


def senet18(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """BackdoorBench's SENet-18 from its weights alone, layer by layer."""
    maps = batch_norm(weights, "bn1", F.conv2d(images, weights["conv1.weight"], padding=1)).relu()
    for stage in range(1, 5):
        for place in range(2):
            at, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            active = batch_norm(weights, f"{at}.bn1", maps).relu()
            if f"{at}.shortcut.0.weight" in weights:
                maps = F.conv2d(active, weights[f"{at}.shortcut.0.weight"], stride=stride)
            inner = F.conv2d(active, weights[f"{at}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(
                batch_norm(weights, f"{at}.bn2", inner).relu(), weights[f"{at}.conv2.weight"], padding=1
            )
            squeezed = F.avg_pool2d(inner, inner.shape[2])
            squeezed = F.conv2d(squeezed, weights[f"{at}.fc1.weight"], weights[f"{at}.fc1.bias"]).relu()
            maps = (
                maps
                + inner * F.conv2d(squeezed, weights[f"{at}.fc2.weight"], weights[f"{at}.fc2.bias"]).sigmoid()
            )
    return F.linear(F.avg_pool2d(maps, 4).flatten(1), weights["linear.weight"], weights["linear.bias"])


def resnext29(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """BackdoorBench's ResNeXt-29 (2x64d) from its weights alone, layer by layer."""
    maps = batch_norm(weights, "bn1", F.conv2d(images, weights["conv1.weight"])).relu()
    for stage in range(1, 4):
        for place in range(3):
            at, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            inner = batch_norm(weights, f"{at}.bn1", F.conv2d(maps, weights[f"{at}.conv1.weight"])).relu()
            inner = F.conv2d(inner, weights[f"{at}.conv2.weight"], stride=stride, padding=1, groups=2)
            inner = F.conv2d(batch_norm(weights, f"{at}.bn2", inner).relu(), weights[f"{at}.conv3.weight"])
            if f"{at}.shortcut.0.weight" in weights:
                maps = F.conv2d(maps, weights[f"{at}.shortcut.0.weight"], stride=stride)
                maps = batch_norm(weights, f"{at}.shortcut.1", maps)
            maps = (batch_norm(weights, f"{at}.bn3", inner) + maps).relu()
    return F.linear(F.avg_pool2d(maps, 8).flatten(1), weights["linear.weight"], weights["linear.bias"])


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.{kind}": (width,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def senet18_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published network's weights."""
    shapes = {
        "conv1.weight": (64, 3, 3, 3),
        **norm("bn1", 64),
        "linear.weight": (CLASSES, 512),
        "linear.bias": (CLASSES,),
    }
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for place in range(2):
            at = f"layer{stage}.{place}"
            shapes |= norm(f"{at}.bn1", before) | norm(f"{at}.bn2", width)
            shapes |= {
                f"{at}.conv1.weight": (width, before, 3, 3),
                f"{at}.conv2.weight": (width, width, 3, 3),
            }
            if before != width:
                shapes[f"{at}.shortcut.0.weight"] = (width, before, 1, 1)
            shapes |= {f"{at}.fc1.weight": (width // 16, width, 1, 1), f"{at}.fc1.bias": (width // 16,)}
            shapes |= {f"{at}.fc2.weight": (width, width // 16, 1, 1), f"{at}.fc2.bias": (width,)}
            before = width
    return shapes


def resnext29_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published network's weights."""
    shapes = {
        "conv1.weight": (64, 3, 1, 1),
        **norm("bn1", 64),
        "linear.weight": (CLASSES, 1024),
        "linear.bias": (CLASSES,),
    }
    before = 64
    for stage, width in enumerate((128, 256, 512), 1):
        for place in range(3):
            at = f"layer{stage}.{place}"
            shapes |= norm(f"{at}.bn1", width) | norm(f"{at}.bn2", width) | norm(f"{at}.bn3", 2 * width)
            shapes |= {
                f"{at}.conv1.weight": (width, before, 1, 1),
                f"{at}.conv2.weight": (width, width // 2, 3, 3),
            }
            shapes[f"{at}.conv3.weight"] = (2 * width, width, 1, 1)
            if before != 2 * width:
                shapes |= {
                    f"{at}.shortcut.0.weight": (2 * width, before, 1, 1),
                    **norm(f"{at}.shortcut.1", 2 * width),
                }
            before = 2 * width
    return shapes


@pytest.mark.parametrize(
    ("name", "shapes", "network"),
    [("senet18", senet18_shapes, senet18), ("resnext29", resnext29_shapes, resnext29)],
)
def test_its_own_networks_have_its_weights_and_its_outputs(name, shapes, network) -> None:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for key, shape in shapes().items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(3)
        else:
            drawn = torch.randn(shape, generator=generator)
            scale = drawn[0].numel() ** -0.5 if len(shape) > 1 else 0.2
            weights[key] = drawn * scale + (len(shape) == 1)
            if key.endswith("running_var"):
                weights[key] = weights[key].abs() + 0.1
    model = build(name)
    assert fit(model, {f"module.{key}": tensor for key, tensor in weights.items()})
    images = torch.rand(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = network(weights, images)
        assert torch.allclose(model(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert set(map(model.their_name, model.state_dict())) == set(weights)
    del weights["linear.bias"]
    with pytest.raises(RecordError, match=r"1 missing: linear\.bias"):
        fit(model, weights)


def test_squeezenet_is_that_of_torchvision_and_has_no_features() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64)
    theirs = torchvision.models.squeezenet1_0(num_classes=CLASSES).eval()
    with torch.no_grad():
        theirs.get_submodule("classifier.1").bias.fill_(1.0)  # Well above 0, or the ReLU makes all logits 0.
    model = build("squeezenet1_0", 64)
    assert fit(model, theirs.state_dict()) == ()
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std(0).min() > 1e-4  # The images make a difference to every logit.
        assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-6)
        normalised = create_model(
            "backdoorbench:squeezenet1_0",
            num_classes=CLASSES, image_size=64, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4],
        ).eval()  # fmt: skip
        fit(normalised, theirs.state_dict())
        shifted = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
            3, 1, 1
        )
        assert torch.allclose(normalised(images), theirs(shifted), rtol=1e-5, atol=1e-6)
    assert {model.their_name(name) for name in model.state_dict()} == set(theirs.state_dict())
    assert all(model.own_name(model.their_name(name)) == name for name in model.state_dict())
    assert model.components()["head"][0].weight.shape == (CLASSES, 512, 1, 1)
    with pytest.raises(ConfigError, match="squeezenet1_0, whose head is a convolution"):
        model.extract_features(images)
    eight = torchvision.models.squeezenet1_0(num_classes=8).state_dict()
    with pytest.raises(RecordError, match="the weights are for 8 classes, and the data have 7"):
        fit(model, eight)


def test_what_does_not_take_the_images_says_why() -> None:
    with pytest.raises(ConfigError, match="inception_v3 does not take images of 32x32"):
        build("inception_v3")


@pytest.mark.parametrize(
    "options", [{"std": (math.nan, 1.0, 1.0)}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5, math.inf, 0.5)}]
)
def test_a_normalisation_has_finite_values(options) -> None:
    with pytest.raises(ConfigError, match=r"^mean and std: expected three finite values each"):
        create_model("backdoorbench:preactresnet18", **options)
