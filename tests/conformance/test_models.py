"""What every model keeps to, whoever wrote it; and what routed ones add."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.models import create_model, list_models, registry
from backdoorbench_moe.models.base import RoutedModel, RoutedOutput
from backdoorbench_moe.ops.seeding import seeded

# Small enough for a test. Gates are spread, so that no rounding decides which patch is selected.
SMALL: dict[str, dict[str, object]] = {
    "pmoe": {"widen_factor": 1, "moe_channels": 16, "expert_channels": 8, "top_k": 6, "gate_std": 1.0},
    "wide_resnet": {"widen_factor": 1},
    "preact_resnet18": {"width": 8},
    "vgg16_bn": {"width": 8},
    "timm": {"architecture": "test_resnet"},
}

name = pytest.mark.parametrize("name", list_models())
routed_name = pytest.mark.parametrize(
    "name", [name for name in list_models() if issubclass(registry.lookup(name), RoutedModel)]
)


def build(name: str, *, seed: int = 0, **given: int) -> nn.Module:
    with seeded(seed, "init"):
        return create_model(name, **SMALL.get(name, {}), **given)


def batch(count: int, *, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@functools.cache
def used(name: str) -> nn.Module:
    """A model that has seen a batch in training mode, so that its norms hold statistics; to be left as it is."""
    model = build(name).train()
    with torch.no_grad():
        for _ in range(3):
            model(batch(16))
    return model.eval()


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


@name
@pytest.mark.parametrize(("size", "classes"), [(32, 10), (32, 3), (64, 3)])
def test_logits(name: str, size: int, classes: int) -> None:
    model = build(name, image_size=size, num_classes=classes)
    for mode in (True, False):
        with torch.no_grad():
            logits = model.train(mode)(batch(4, size=size))
        assert logits.shape == (4, classes) and logits.dtype == torch.float32
        assert logits.isfinite().all()
        assert (logits != logits[:1]).any(), "the images make no difference"


@name
def test_a_gradient_reaches_every_parameter_and_the_images(name: str) -> None:
    model = build(name).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # Norms that start at zero let nothing through to what lies before them.
                parameter.add_(0.1 * torch.rand(len(parameter), generator=torch.Generator().manual_seed(1)))
    images = batch(8).requires_grad_()
    F.cross_entropy(model(images), torch.arange(8)).backward()
    assert images.grad is not None and (images.grad != 0).any()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} has no gradient"
        assert parameter.grad.isfinite().all(), key
        assert parameter.ndim == 1 or (parameter.grad != 0).any(), f"{key}: its gradient is zero"


@name
def test_the_seed_decides_the_weights(name: str) -> None:
    first = build(name).state_dict()
    torch.rand(1)
    assert not changed(first, build(name))
    assert changed(first, build(name, seed=1))


@name
def test_building_and_running_leave_nothing_global_behind(name: str) -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    model = build(name).eval()
    model(batch(2))
    assert settings() == before


@name
def test_images_do_not_mix_in_evaluation(name: str) -> None:
    model, images = used(name), batch(5)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = model(images.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, shuffled, atol=1e-4, rtol=1e-4)


@name
def test_evaluation_changes_nothing_and_training_mode_no_weights(name: str) -> None:
    model, images = build(name), batch(4)
    before, given = copies(model.state_dict()), images.clone()
    parameters = {key for key, _ in model.named_parameters()}
    with torch.no_grad():
        first = model.eval()(images)
        assert torch.equal(model(images), first)
        assert not changed(before, model)
        model.train()(images)
    assert not changed(before, model) & parameters
    assert torch.equal(images, given), "the input was written to"
    assert all(module.training for module in model.modules())


@name
def test_the_mode_is_all_that_training_and_evaluation_differ_by(name: str) -> None:
    """After a pass in training mode, a model that starts from the same state answers the same."""
    model, twin = used(name), build(name, seed=5)
    with torch.no_grad():
        twin.train()(batch(4))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.eval()(batch(4)), model(batch(4)))


@name
def test_memory_layout_does_not_matter(name: str) -> None:
    plain, images = used(name), batch(4)
    other = build(name).to(memory_format=torch.channels_last).eval()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        want = plain(images)
        strided = plain(images.contiguous(memory_format=torch.channels_last))
        got = other(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@name
def test_the_state_makes_the_model(name: str) -> None:
    state = copies(used(name).state_dict())
    assert all(tensor.isfinite().all() for tensor in state.values())
    other = build(name, seed=9)
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(batch(3)), used(name)(batch(3)))


@name
def test_unknown_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        create_model(name, no_such_option=1)


def routed(name: str, size: int) -> tuple[RoutedModel, RoutedOutput]:
    """A routed model of this name and what it did with 3 images."""
    model = used(name) if size == 32 else build(name, image_size=size).eval()
    assert isinstance(model, RoutedModel)
    with torch.no_grad():
        return model, model.forward_routed(batch(3, size=size))


@routed_name
@pytest.mark.parametrize("size", [32, 64])
def test_routing_is_returned(name: str, size: int) -> None:
    model, output = routed(name, size)
    assert torch.equal(output.logits, model(batch(3, size=size)).detach())
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


@routed_name
def test_selection_follows_the_gates(name: str) -> None:
    """Where each expert chooses, it takes as many patches of every image, those that its gates rank first."""
    _, output = routed(name, 32)
    top_k = SMALL.get(name, {}).get("top_k")
    for routing in output.routing:
        if top_k is None:
            assert (routing.selected.sum((1, 2)) >= 1).all()
            continue
        assert (routing.selected.sum(-1) == top_k).all()
        taken = routing.gates.masked_fill(~routing.selected, 2).amin(-1)
        left = routing.gates.masked_fill(routing.selected, -1).amax(-1)
        assert (taken >= left).all()


@routed_name
def test_routing_of_an_image_is_its_own(name: str) -> None:
    model, output = routed(name, 32)
    with torch.no_grad():
        alone = [model.forward_routed(image[None]).routing for image in batch(3)]
    for layer, routing in enumerate(output.routing):
        assert torch.equal(routing.selected, torch.cat([image[layer].selected for image in alone]))
