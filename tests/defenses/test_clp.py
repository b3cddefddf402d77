"""Bounds by NumPy, planted channels, experts and gates, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from defense_tasks import changed, copies, make_task, used_model
from torch import nn

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.defenses.clp import channel_bounds, spectral_norms
from backdoorbench_moe.defenses.outlying import Group
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.testing.mixtures import build_mixture, make_mixture_task


def clp(model: nn.Module, name: str = "pmoe", **options: object):
    task, _ = make_task(model, name=name)
    return create_defense("clp", **options)(task)


def numpy_bound(conv: nn.Module, norm: nn.BatchNorm2d, channel: int) -> float:
    kernel = conv.weight[channel].detach().double().numpy()
    largest = np.linalg.svd(kernel.reshape(len(kernel), -1), compute_uv=False)[0]
    return largest * abs(norm.weight[channel].item()) / math.sqrt(norm.running_var[channel].item() + norm.eps)


def test_bounds_agree_with_numpy() -> None:
    model = used_model()
    block = model.trunk.block1
    with torch.no_grad():
        block.norm2.weight[::2] *= -1  # The bound does not depend on the sign of a scale.
    bounds = channel_bounds(model, 32)
    expected = [numpy_bound(block.conv1, block.norm2, c) for c in range(16)]
    np.testing.assert_allclose(bounds["trunk.block1.norm2"].numpy(), expected, rtol=1e-5)
    expected = [numpy_bound(model.moe.conv, model.norm, c) for c in range(20)]
    np.testing.assert_allclose(bounds["norm"].numpy(), expected, rtol=1e-5)


def test_the_bound_of_a_sum_bounds_both_terms_together() -> None:
    model = used_model("wide_resnet")
    bounds = channel_bounds(model, 32)["block3.norm1"]
    block, norm = model.trunk.block2, model.block3.norm1
    for channel in (0, 7, 31):
        both = math.hypot(numpy_bound(block.conv2, norm, channel), numpy_bound(block.shortcut, norm, channel))
        assert bounds[channel].item() == pytest.approx(both, rel=1e-5)


def test_a_kernel_by_hand() -> None:
    """[[3, 0], [0, 4]] has the singular values 3 and 4; a row of a linear layer its length."""
    conv = nn.Conv2d(2, 1, (1, 2), bias=False)
    conv.weight.data = torch.tensor([[[[3.0, 0]], [[0, 4.0]]]])
    assert spectral_norms(conv).tolist() == pytest.approx([4.0])
    linear = nn.Linear(2, 1)
    linear.weight.data = torch.tensor([[3.0, 4.0]])
    assert spectral_norms(linear).tolist() == pytest.approx([5.0])


@pytest.mark.parametrize(
    ("name", "conv", "norm"),
    [
        ("wide_resnet", "trunk.block2.conv1", "trunk.block2.norm2"),
        ("wide_resnet", "block3.shortcut", "norm"),
        ("preact_resnet18", "blocks.3.conv2", "blocks.4.norm1"),
        ("vgg16_bn", "features.34", "features.35"),
        ("pmoe", "trunk.block1.conv2", "trunk.block2.norm1"),
    ],
)
def test_a_planted_channel_is_pruned_and_no_other(name, conv, norm) -> None:
    model = used_model(name)
    with torch.no_grad():
        model.get_submodule(conv).weight[5] *= 500
    before = copies(model)
    result = clp(model, name)
    found = result.judgements[0]
    assert found.details["pruned"] == {norm: [5]} and found.suspicious == [norm]
    assert changed(before, copies(model)) <= {f"{norm}.weight", f"{norm}.bias"}
    scale, shift = model.get_submodule(norm).weight, model.get_submodule(norm).bias
    assert scale[5] == shift[5] == 0 and (scale != 0).sum() == len(scale) - 1
    assert found.scores[norm] > 3 and result.stage == "pruned"


def test_a_model_without_outliers_is_left_alone() -> None:
    model = used_model("vgg16_bn")
    before = copies(model)
    result = clp(model, "vgg16_bn", u=4.5)
    assert not changed(before, copies(model))
    assert result.judgements[0].suspicious == [] and len(result.judgements) == 1


def wide_experts() -> nn.Module:
    """A pMoE with 16 channels in each expert, of which those of expert 3 are a hundred times as large as others'."""
    from backdoorbench_moe.models import create_model
    from backdoorbench_moe.testing.making import settle

    torch.manual_seed(0)
    model = create_model(
        "pmoe", num_classes=3, widen_factor=1, moe_channels=16, expert_channels=16, gate_std=1.0
    )
    settle(model)
    with torch.no_grad():
        model.moe.conv.weight[48:] *= 100
        model.moe.conv.weight[20] *= 40
    return model


def test_an_outlier_within_its_expert_hides_among_larger_experts() -> None:
    """Channel 20, of expert 1, is far above the others of its expert, but below all of expert 3."""
    model = wide_experts()
    result = clp(model)
    assert result.judgements[0].details["pruned"] == {"norm": [20]}
    assert result.judgements[0].suspicious == ["norm of moe/1"]
    model = wide_experts()
    assert clp(model, experts=False).judgements[0].details["pruned"] == {}


def test_groups_that_are_too_small_for_the_threshold_are_named() -> None:
    found = clp(used_model()).judgements[0]
    assert set(found.details["too_small"]) == {*(f"norm of moe/{e}" for e in range(4)), "reduce"}
    assert found.details["channels"]["norm of moe/2"] == 5


def test_a_long_row_of_the_gates_is_pruned() -> None:
    model = used_model()
    with torch.no_grad():
        model.moe.router.weight[2] *= 100
    found = clp(model).judgements[1]
    assert found.about == "expert" and found.suspicious == ["moe/2"]
    assert (model.moe.router.weight == 0).all(1).tolist() == [False, False, True, False]
    other = used_model()
    with torch.no_grad():
        other.moe.router.weight[2] *= 100
    assert len(clp(other, experts=False).judgements) == 1 and (other.moe.router.weight != 0).all()


def test_a_short_row_of_the_gates_is_not_pruned() -> None:
    """It is as far from the others as a long one, but a short row cannot amplify anything."""
    model = used_model()
    with torch.no_grad():
        lengths = torch.tensor([1.0, 1.01, 0.01, 0.99]).unsqueeze(1)
        model.moe.router.weight.copy_(nn.functional.normalize(model.moe.router.weight, dim=1) * lengths)
    found = clp(model).judgements[1]
    assert found.scores["moe/2"] < -3 and found.suspicious == []
    assert (model.moe.router.weight != 0).any(1).all()


def test_of_a_group_only_channels_above_the_mean_are_outliers() -> None:
    """One of nine values differs: it is 8 / 3 standard deviations from the mean."""
    for value, far, most in ((10.0, [13], 8 / 3), (0.0, [], 1 / 3)):
        scores = torch.full((9,), 5.0)
        scores[5] = value
        group = Group("norm", "moe/1", 8, scores)
        assert group.far(2.5) == far and group.most() == pytest.approx(most)


def test_hidden_units_of_experts_of_a_mixture() -> None:
    model = build_mixture()
    name = "network.blocks.1.mlp.experts.fc1"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight[70] *= 50
    task, _ = make_mixture_task(model)
    found = create_defense("clp")(task).judgements[0]
    assert found.details["pruned"] == {name: [70]} and (layer.weight[70] == 0).all() and layer.bias[70] == 0
    assert found.suspicious == [f"{name} of network.blocks.1.mlp/1"]


def test_it_gets_no_images_and_the_same_model_twice_gives_the_same() -> None:
    defense = create_defense("clp", u=1.5)
    assert defense.count(1000, 10) == 0 and not defense.needs
    first, second = used_model(), used_model()
    one, two = clp(first, u=1.5), clp(second, u=1.5)
    assert one.judgements == two.judgements and not changed(copies(first), copies(second))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="u: expected a positive number, got 0"):
        create_defense("clp", u=0)
    with pytest.raises(ConfigError, match=r"u: expected below 7\.88, .* one of 64 channels .* got 8"):
        create_defense("clp", u=8).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match="model: expected a routed model, WideResNet has no routing"):
        create_defense("clp", experts=True).check(used_model("wide_resnet"))
    with pytest.raises(ConfigError, match="model: Linear has neither convolutions with batch norms nor MLPs"):
        create_defense("clp").check(nn.Linear(3, 3))
