"""The small network of ConvNeXt's blocks: its size, its patches, its weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.ops.seeding import seeded


def build(**options):
    with seeded(0, "init"):
        return create_model("convnext", **options)


def test_parameters_by_hand():
    d, hidden = 64, 256
    stem = (9 * 3 * 32 + 32) + (9 * 32 * d + d) + 2 * d
    block = (9 * d + d) + 2 * d + (d * hidden + hidden) + (hidden * d + d) + d
    want = stem + 4 * block + 2 * d + (d * 10 + 10)
    assert sum(p.numel() for p in build().parameters()) == want


@pytest.mark.parametrize(
    ("patch_size", "image_size", "widths"),
    [(2, 32, [16]), (4, 32, [8, 16]), (8, 64, [4, 8, 16]), (32, 32, [1, 2, 4, 8, 16]), (4, 36, [8, 16])],
)
def test_the_stem_has_a_convolution_for_each_halving(patch_size, image_size, widths):
    model = build(patch_size=patch_size, image_size=image_size, features=16, depth=1)
    side = image_size // patch_size
    assert [conv.out_channels for conv in model.stem if isinstance(conv, nn.Conv2d)] == widths
    assert model.stem(torch.rand(1, 3, image_size, image_size)).shape == (1, 16, side, side)
    assert model.token_layout() == ((side, side), 0) and model.patch_size == patch_size


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_a_patch_sees_its_tile_and_the_pixels_before_it(patch_size):
    """The input pixels that the stem's patch (1, 1) depends on, by its gradient before the norm."""
    model = build(patch_size=patch_size, features=16, depth=1)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    model.stem[:-1](images)[0, :, 1, 1].sum().backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten().tolist()
    columns = images.grad[0].abs().sum((0, 1)).nonzero().flatten().tolist()
    assert rows == columns == list(range(1, 2 * patch_size))


def test_the_spread_of_values_is_kept_through_a_linear_layer():
    """He's normal distribution with gain 1: a variance of 1 / fan-in. Biases are 0, layer scales 1."""
    model = build(features=256, depth=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert module.weight.var().item() == pytest.approx(1 / fan_in, rel=0.15)
            assert not module.bias.any()
    assert all((block.gamma == 1).all() for block in model.blocks)


def test_it_runs_in_bf16_and_any_memory_format():
    model, images = build(features=16, depth=2).eval(), torch.rand(4, 3, 32, 32)
    last = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        model.to(memory_format=torch.channels_last)
        halved = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(halved.float(), last, rtol=0.05, atol=0.05)


def test_what_is_pruned_are_hidden_units_of_the_last_mlp():
    model = build(features=16, depth=3, mlp_ratio=2.5)
    [group] = model.prunable()["trunk"]
    assert group.layer is model.blocks[2].mlp.fc1 and len(group) == 40
    assert list(model.mlps()) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "features: expected an integer of at least 2, got 1"),
        ({"depth": 0}, "depth: expected an integer of at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number of at least 1, got 4"),
        ({"kernel_size": -1}, "kernel_size: expected an odd number of at least 1, got -1"),
        ({"patch_size": 3}, "patch_size: expected a power of two from 2 on, got 3"),
        ({"patch_size": 1}, "patch_size: expected a power of two from 2 on, got 1"),
        ({"patch_size": 0}, "patch_size: expected a power of two from 2 on, got 0"),
        (
            {"patch_size": 8, "image_size": 36},
            "patch_size: expected a divisor of the image's 36 pixels, got 8",
        ),
        ({"mlp_ratio": 0}, "mlp_ratio: expected a number of at least 1/64, got 0"),
        ({"features": 49, "mlp_ratio": 1 / 49}, "mlp_ratio: expected a number of at least 1/49, got 0.02"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio: expected a number of at least 1/64, got nan"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio: expected a number of at least 1/64, got inf"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1, got 0"),
        ({"image_size": 0}, "image_size: expected at least 2"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(**options)
