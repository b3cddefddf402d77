"""Conformance tests of models, and of the routing of routed models."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.moe.routed import RoutedModel, RoutedOutput, auxiliary_loss, forward
from backdoorbench_moe.testing.making import (
    CPU,
    batch,
    build_model,
    changed,
    copies,
    global_settings,
    make,
    ranked,
    settle,
)

only_routed = pytest.mark.only(interface=RoutedModel)


def images_of(count: int, *, size: int = 32) -> Tensor:
    return batch(count, 3, size, size)


@functools.cache
def used(name: str) -> nn.Module:
    """Return a model that has seen some batches in training mode. It is shared, so tests must not change it."""
    return settle(build_model(name))


@pytest.mark.parametrize(("size", "classes"), [(32, 10), (32, 3), (64, 3)])
def test_logits(model_name: str, size: int, classes: int) -> None:
    model = build_model(model_name, image_size=size, num_classes=classes)
    for mode in (True, False):
        with torch.no_grad():
            logits = model.train(mode)(images_of(4, size=size))
        assert logits.shape == (4, classes) and logits.dtype == torch.float32
        assert logits.isfinite().all()
        assert (logits != logits[:1]).any(), "the images make no difference"


def test_a_gradient_reaches_every_parameter_and_the_images(model_name: str) -> None:
    model = build_model(model_name).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.ndim == 1
            ):  # A norm with scale zero lets no gradient through to the layers before it.
                parameter.add_(0.1 * torch.rand(len(parameter), generator=torch.Generator().manual_seed(1)))
    images = images_of(8).requires_grad_()
    F.cross_entropy(model(images), torch.arange(8)).backward()
    assert images.grad is not None and (images.grad != 0).any()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        assert parameter.grad.isfinite().all(), key
        assert parameter.ndim == 1 or (parameter.grad != 0).any(), f"{key}: its gradient is zero"


def train_in_bfloat16(model: nn.Module) -> None:
    """Compute the loss of a training step as the engine does, and its gradients."""
    with autocast(CPU, "bf16"):
        logits, routing = forward(model.train(), images_of(8))
    for each in routing:
        loss = each.aux_loss
        assert loss is None or (isinstance(loss, Tensor) and loss.ndim == 0 and loss.isfinite()), (
            f"{each.layer}: its auxiliary loss is not a finite scalar"
        )
    (F.cross_entropy(logits.float(), torch.arange(8)) + auxiliary_loss(routing)).backward()


def test_it_runs_in_bfloat16(model_name: str) -> None:
    """Where the hardware has bfloat16, it is the default precision of a run."""
    model = build_model(model_name)
    train_in_bfloat16(model)
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    with torch.no_grad(), autocast(CPU, "bf16"):
        assert model.eval()(images_of(4)).isfinite().all()


def test_it_can_be_copied_after_a_training_step(model_name: str) -> None:
    """The model is copied after every stage of a defense. Results of a step, such as features, cannot be copied."""
    model = build_model(model_name)
    train_in_bfloat16(model)
    assert not changed(copies(model), copy.deepcopy(model).state_dict())


def test_the_seed_decides_the_weights(model_name: str) -> None:
    first = build_model(model_name).state_dict()
    torch.rand(1)
    assert not changed(first, build_model(model_name).state_dict())
    assert changed(first, build_model(model_name, seed=1).state_dict())


def test_building_and_running_change_no_global_setting(model_name: str) -> None:
    before, state = global_settings(), torch.get_rng_state()
    model = build_model(model_name).eval()
    model(images_of(2))
    assert global_settings() == before and torch.equal(torch.get_rng_state(), state)


def test_images_do_not_mix_in_evaluation(model_name: str) -> None:
    model, images = used(model_name), images_of(5)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = model(images.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, shuffled, atol=1e-4, rtol=1e-4)


def test_evaluation_changes_nothing_and_training_mode_no_weights(model_name: str) -> None:
    model, images = build_model(model_name), images_of(4)
    before, given = copies(model), images.clone()
    parameters = {key for key, _ in model.named_parameters()}
    with torch.no_grad():
        first = model.eval()(images)
        assert torch.equal(model(images), first)
        assert not changed(before, model.state_dict())
        model.train()(images)
    assert not changed(before, model.state_dict()) & parameters
    assert torch.equal(images, given), "the input was written to"
    assert all(module.training for module in model.modules())


def test_training_leaves_nothing_behind_that_is_not_in_the_state(model_name: str) -> None:
    """After a pass in training mode, a model that loads the state of another gives the same logits."""
    model, twin = used(model_name), build_model(model_name, seed=5)
    with torch.no_grad():
        twin.train()(images_of(4))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.eval()(images_of(4)), model(images_of(4)))


def test_memory_layout_does_not_matter(model_name: str) -> None:
    plain, images = used(model_name), images_of(4)
    other = build_model(model_name).to(memory_format=torch.channels_last).eval()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        want = plain(images)
        strided = plain(images.contiguous(memory_format=torch.channels_last))
        got = other(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_models_with_the_same_state_are_the_same(model_name: str) -> None:
    state = copies(used(model_name))
    assert all(tensor.isfinite().all() for tensor in state.values())
    other = build_model(model_name, seed=9)
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(images_of(3)), used(model_name)(images_of(3)))


def test_unknown_options_are_refused_by_name(model_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make("model", model_name, no_such_option=1)


def routed(model_name: str, size: int) -> tuple[RoutedModel, RoutedOutput]:
    """Return a routed model and its output for 3 images."""
    model = used(model_name) if size == 32 else build_model(model_name, image_size=size).eval()
    assert isinstance(model, RoutedModel)
    with torch.no_grad():
        return model, model.forward_routed(images_of(3, size=size))


@only_routed
@pytest.mark.parametrize("size", [32, 64])
def test_routing_is_returned(model_name: str, size: int) -> None:
    model, output = routed(model_name, size)
    assert torch.equal(output.logits, model(images_of(3, size=size)).detach())
    rows, columns = model.patch_grid
    assert (rows * model.patch_size, columns * model.patch_size) == (size, size)
    modules = dict(model.named_modules())
    assert output.routing
    for routing in output.routing:
        assert routing.layer in modules
        images, experts, patches = routing.gates.shape
        assert (images, patches) == (3, rows * columns) and experts >= 1
        assert routing.gates.is_floating_point() and routing.selected.dtype == torch.bool
        assert routing.selected.shape == routing.gates.shape
        assert routing.gates.min() >= 0 and routing.gates.max() <= 1


@only_routed
def test_selection_follows_the_gates(model_name: str) -> None:
    """If all experts select the same number of patches, or all patches of experts, these have the largest gates."""
    _, output = routed(model_name, 32)
    for routing in output.routing:
        assert (routing.selected.sum((1, 2)) >= 1).all()
        even = [dim for dim in (1, 2) if routing.selected.sum(dim).unique().numel() == 1]
        assert not even or any(ranked(routing, dim) for dim in even)


@only_routed
def test_routing_of_an_image_is_its_own(model_name: str) -> None:
    model, output = routed(model_name, 32)
    with torch.no_grad():
        alone = [model.forward_routed(image[None]).routing for image in images_of(3)]
    for layer, routing in enumerate(output.routing):
        assert torch.equal(routing.selected, torch.cat([image[layer].selected for image in alone]))
