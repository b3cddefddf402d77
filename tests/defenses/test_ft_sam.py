"""FT-SAM against a second implementation, which writes the shift into the weights and takes it back."""

from __future__ import annotations

import copy

import pytest
import torch
from defense_tasks import changed, copies, held_images, make_task, used_model
from torch import nn
from torch.nn import functional as F

from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.testing.making import build_model
from backdoorbench_moe.testing.mixtures import build_mixture

RHO, SMOOTHING = 0.7, 0.2


def loss_of(model: nn.Module, images, labels):
    """The smoothed cross-entropy, written out, and the auxiliary losses."""
    aux = (
        [r.aux_loss for r in model.forward_routed(images).routing] if hasattr(model, "forward_routed") else []
    )
    logs = F.log_softmax(model(images), 1)
    smooth = -(1 - SMOOTHING) * logs[range(len(labels)), labels] - SMOOTHING * logs.mean(1)
    return smooth.mean() + sum(each for each in aux if each is not None)


def by_hand(model: nn.Module, adaptive: bool, images, labels) -> dict[str, torch.Tensor]:
    """The gradients of the trained weights at the shifted weights."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss_of(model, images, labels).backward()
    scales = {n: w.detach().abs() if adaptive else torch.ones_like(w) for n, w in weights.items()}
    norm = torch.cat([(scales[n] * w.grad).flatten() for n, w in weights.items()]).norm()
    with torch.no_grad():
        for name, weight in weights.items():
            weight += RHO * scales[name] ** 2 * weight.grad / norm
            weight.grad = None
    loss_of(model, images, labels).backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("scope", ["all", "router"])
def test_the_gradient_is_that_at_the_shifted_weights(adaptive, scope) -> None:
    model, split = used_model(), held_images(8)
    images, labels = as_input(split.images), split.labels
    if scope == "router":
        for name, weight in model.named_parameters():
            weight.requires_grad_("router" in name)
    twin, before = copy.deepcopy(model), copies(model)
    defense = create_defense("ft-sam", rho=RHO, adaptive=adaptive, label_smoothing=SMOOTHING, scope=scope)
    _, loss = defense.sharp_loss(model, images, labels)
    loss.backward()
    assert not changed(before, copies(model)), "the weights are not written to"
    own = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    for name, expected in by_hand(twin, adaptive, images, labels).items():
        torch.testing.assert_close(own[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["preact_resnet18", "mixture"])
def test_running_statistics_change_in_the_first_pass_only(name) -> None:
    split = held_images(8)
    images, labels = as_input(split.images), split.labels
    model = build_mixture() if name == "mixture" else build_model(name, num_classes=3)
    model.train()
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    create_defense("ft-sam").sharp_loss(model, images, labels)[1].backward()
    torch.manual_seed(0)
    twin(images)
    assert not changed(copies(twin), copies(model))
    assert all(weight.grad is not None for weight in model.parameters())


def test_in_a_tiny_ball_without_smoothing_it_is_plain_tuning() -> None:
    tuned, before = [], copies(used_model("wide_resnet"))
    for name, options in (("fine-tuning", {}), ("ft-sam", {"rho": 1e-6, "label_smoothing": 0.0})):
        model = used_model("wide_resnet")
        create_defense(name, epochs=1, **options)(make_task(model, name="wide_resnet", lr=1e-3)[0])
        tuned.append(copies(model))
    for name, expected in tuned[0].items():
        if expected.is_floating_point():
            moved = (expected - before[name]).norm()
            assert (tuned[1][name] - expected).norm() <= 0.02 * moved + 1e-6, name
    assert len(changed(before, tuned[0])) > 20


def test_what_is_out_of_scope_keeps_its_weights_and_statistics() -> None:
    model = used_model()
    before = copies(model)
    create_defense("ft-sam", scope="experts", epochs=1)(make_task(model)[0])
    names = changed(before, copies(model))
    assert names and all(name.startswith(("moe.norm.", "moe.conv.", "norm.")) for name in names)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="rho: expected a positive number, got 0"):
        create_defense("ft-sam", rho=0.0)
    with pytest.raises(ConfigError, match=r"label_smoothing: expected a number in \[0, 1\), got 1"):
        create_defense("ft-sam", label_smoothing=1.0)
    with pytest.raises(ConfigError, match=r"scope: expected one of .* for WideResNet, got 'router'"):
        create_defense("ft-sam", scope="router").check(used_model("wide_resnet"))
