"""The dense baselines: sizes known from the literature or worked out by hand, and what they refuse."""

import pytest
import torch
from plain_pmoe import batch_norm, conv_same
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models import create_model, list_models
from backdoorbench_moe.models.wrn_blocks import WideTrunk

NARROW = {"wide_resnet": {"widen_factor": 1}, "preact_resnet18": {"width": 8}, "vgg16_bn": {"width": 4}}


def parameters(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **options).parameters())


def test_all_models_are_registered():
    assert {"pmoe", "wide_resnet", "preact_resnet18", "vgg16_bn", "timm"} <= set(list_models())


def test_wide_resnet_parameters_by_hand():
    def conv(kernel, fan_in, fan_out):
        return kernel * kernel * fan_in * fan_out + fan_out

    def block(fan_in, fan_out):
        norms = 2 * fan_in + 2 * fan_out
        return norms + conv(3, fan_in, fan_out) + conv(3, fan_out, fan_out) + conv(1, fan_in, fan_out)

    want = conv(3, 3, 16) + block(16, 160) + block(160, 320) + block(320, 640) + 2 * 640 + 640 * 10 + 10
    assert parameters("wide_resnet") == want


def test_published_parameter_counts():
    # kuangliu's PreActResNet18 has 11,171,146; the paper's last BN adds 2 * 512.
    assert parameters("preact_resnet18") == 11_171_146 + 2 * 512
    # torchvision's vgg16_bn without its three dense layers, and 512 * 10 + 10 for ours.
    assert parameters("vgg16_bn") == 14_723_136 + 5_130


def test_wide_resnet_shares_pmoes_trunk():
    wide = create_model("wide_resnet", widen_factor=1)
    routed = create_model("pmoe", widen_factor=1, moe_channels=8, expert_channels=4)
    assert type(wide.trunk) is type(routed.trunk) is WideTrunk
    routed.trunk.load_state_dict(wide.trunk.state_dict())


@pytest.mark.parametrize("name", sorted(NARROW))
@pytest.mark.parametrize("size", [32, 33, 64])
def test_any_image_size(name, size):
    model = create_model(name, num_classes=7, image_size=size, **NARROW[name])
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", sorted(NARROW))
def test_impossible_sizes_are_refused(name):
    (option,) = NARROW[name]
    with pytest.raises(ConfigError, match=f"^{option}: expected"):
        create_model(name, **{option: 0})
    with pytest.raises(ConfigError, match=r"^image_size: expected at least"):
        create_model(name, image_size=2)
    with pytest.raises(UnknownNameError, match="option"):
        create_model(name, widht=3)


@pytest.mark.parametrize("name", sorted(NARROW))
def test_channels_last_changes_nothing(name):
    model = create_model(name, **NARROW[name]).eval()
    images = torch.rand(2, 3, 32, 32)
    want = model(images)
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-5)


def test_a_wide_resnet_between_two_whole_factors():
    model = create_model("wide_resnet", widen_factor=1.78)
    channels = [model.trunk.block1, model.trunk.block2, model.block3]
    assert [block.conv2.out_channels for block in channels] == [28, 57, 114]  # 28.48, 56.96, 113.92
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ConfigError, match=r"widen_factor: expected a number of at least 1, got 0\.5"):
        create_model("wide_resnet", widen_factor=0.5)


def test_a_width_that_crashes_some_machines_is_refused():
    with pytest.raises(ConfigError, match=r"width: expected at least 8 .*, got 7"):
        create_model("preact_resnet18", width=7)


def shaken(name, **options):
    """A model in evaluation mode and float64 whose norms and biases are drawn, so that leaving one out shows."""
    torch.manual_seed(0)
    model = create_model(name, **NARROW[name], **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)
    return model, {key: value.detach() for key, value in model.state_dict().items()}


def test_wide_resnet_by_its_description():
    """Three blocks of strides 1, 2, 2; each shortcut is a convolution of the block's input before the activation."""
    model, state = shaken("wide_resnet")

    def conv(x, name, stride=1):
        return conv_same(x, state[f"{name}.weight"].permute(2, 3, 1, 0), state[f"{name}.bias"], stride)

    def active(x, name):
        parts = ("weight", "bias", "running_mean", "running_var")
        return batch_norm(x, [state[f"{name}.{part}"] for part in parts], False, []).relu()

    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    x = conv(images.permute(0, 2, 3, 1), "trunk.stem")
    for block, stride in (("trunk.block1", 1), ("trunk.block2", 2), ("block3", 2)):
        change = conv(active(x, f"{block}.norm1"), f"{block}.conv1", stride)
        change = conv(active(change, f"{block}.norm2"), f"{block}.conv2")
        x = conv(x, f"{block}.shortcut", stride) + change
    features = active(x, "norm").mean((1, 2))
    torch.testing.assert_close(model(images), features @ state["head.weight"].T + state["head.bias"])


def test_preact_resnet_by_the_paper():
    """Stages of strides 1, 2, 2, 2; a shortcut is the input itself or, where the shape changes, a convolution of it
    after the activation, as in the paper's figure for a first unit."""
    model, state = shaken("preact_resnet18")

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def active(x, name):
        mean, var, scale, shift = (
            state[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()

    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    x = conv(images, "stem")
    for place in range(8):
        block, halved = f"blocks.{place}", place in (2, 4, 6)
        stride = 2 if halved else 1
        ready = active(x, f"{block}.norm1")
        change = conv(active(conv(ready, f"{block}.conv1", stride), f"{block}.norm2"), f"{block}.conv2")
        x = (conv(ready, f"{block}.shortcut", stride) if halved else x) + change
    features = active(x, "norm").mean((2, 3))
    torch.testing.assert_close(model(images), features @ state["head.weight"].T + state["head.bias"])


@pytest.mark.parametrize(
    ("kernel", "fan_out"), [("stem", 9 * 64), ("blocks.2.shortcut", 128), ("blocks.6.conv1", 9 * 512)]
)
def test_kernels_of_preact_resnet_are_those_of_he_for_the_backward_pass(kernel, fan_out):
    torch.manual_seed(0)
    weight = create_model("preact_resnet18").get_submodule(kernel).weight
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
