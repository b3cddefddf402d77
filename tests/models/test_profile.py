"""Counts of parameters and multiply-adds against counts by hand."""

import pytest
import torch
from torch import nn

from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.profile import ModelProfile, profile_model


def test_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(),
        nn.Linear(6 * 64, 10),
    )  # fmt: skip
    parameters = 3 * 4 * 9 + 4 + 8 + 2 * 6 + 6 + 384 * 10 + 10
    multiply_adds = 64 * (3 * 4 * 9 + 2 * 6) + 384 * 10
    assert profile_model(model, 8) == ModelProfile(parameters, 8, multiply_adds)


def test_a_model_without_parameters():
    assert profile_model(nn.Flatten(), 8) == ModelProfile(0, 0, 0)


def pmoe_multiply_adds(k, moe, expert, experts=4, classes=10):
    """From the description: maps of 32x32, 16x16 and 8x8 cells."""
    block1 = 32 * 32 * (9 * 16 * 16 * k + 9 * (16 * k) ** 2 + 16 * 16 * k)
    block2 = 16 * 16 * (9 * 16 * k * 32 * k + 9 * (32 * k) ** 2 + 16 * k * 32 * k)
    routed = 64 * (9 * 32 * k * moe + moe * experts + moe * expert * experts)
    return 32 * 32 * 9 * 3 * 16 + block1 + block2 + routed + experts * expert * classes


@pytest.mark.parametrize(("k", "moe", "expert"), [(2, 128, 32), (10, 640, 160)])
def test_pmoe(k, moe, expert):
    with torch.device("meta"):
        model = create_model("pmoe", widen_factor=k, moe_channels=moe, expert_channels=expert)
    assert profile_model(model, 32).multiply_adds == pmoe_multiply_adds(k, moe, expert)


def test_small_pmoe_has_about_33_million():
    assert 31e6 < pmoe_multiply_adds(2, 128, 32) < 36e6


def test_attention_is_counted():
    model = create_model("timm:test_vit", image_size=32, patch_size=8)
    network = model.network
    tokens, width = 17, network.embed_dim
    layers = 16 * 3 * 64 * width + network.num_classes * width
    for block in network.blocks:
        dense = sum(m.in_features * m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        layers += tokens * dense + 2 * tokens * tokens * width
    assert profile_model(model, 32).multiply_adds == layers


def test_model_is_left_as_it_was():
    model = create_model("pmoe", widen_factor=1, moe_channels=8, expert_channels=4).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile_model(model, 32)
    assert model.training and model.moe.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_buffers_that_are_not_stored_do_not_count():
    options = {"widen_factor": 1, "moe_channels": 8, "expert_channels": 4}
    plain = profile_model(create_model("pmoe", **options), 32)
    normalised = create_model("pmoe", mean="cifar10", **options)
    assert {name for name, _ in normalised.named_buffers()} > normalised.state_dict().keys() - {
        name for name, _ in normalised.named_parameters()
    }
    assert profile_model(normalised, 32) == plain
