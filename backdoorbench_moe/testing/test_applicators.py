"""Conformance tests of applicators, with every trigger."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import ShapeError, UnknownNameError
from backdoorbench_moe.testing.making import batch, make
from backdoorbench_moe.triggers.base import Trigger

# Side in pixels. Triggers may refuse smaller canvases, see the canvases in `test_triggers`.
SMALLEST_CANVAS = 4


@pytest.fixture
def applicator(applicator_name: str) -> Applicator:
    return make("applicator", applicator_name)


@pytest.fixture
def trigger(trigger_name: str) -> Trigger:
    return make("trigger", trigger_name, seed=7)


def apply_or_skip(applicator: Applicator, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a trigger; skip the test if the trigger refuses canvases that are smaller than triggers have to support."""
    sides = []

    def watched(canvases: Tensor) -> Tensor:
        sides.append(min(canvases.shape[-2:]))
        return trigger(canvases)

    try:
        return applicator(images, watched)
    except ShapeError:
        if sides and min(sides) < SMALLEST_CANVAS:
            pytest.skip(f"the trigger does not support canvases with a side of {min(sides)} pixels")
        raise


@pytest.mark.parametrize("canvas", [(4, 4), (8, 12), (32, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_type_and_range(
    applicator: Applicator, trigger: Trigger, canvas: tuple[int, int], dtype: torch.dtype
) -> None:
    images = batch(3, 3, *canvas, dtype=dtype)
    before = images.clone()
    stamped = apply_or_skip(applicator, images, trigger)
    assert (stamped.shape, stamped.dtype, stamped.device) == (images.shape, dtype, images.device)
    assert stamped.min() >= 0 and stamped.max() <= 1
    assert torch.equal(images, before), "the input was written to"
    assert not torch.equal(stamped, images), "nothing was stamped"


def test_the_trigger_is_applied(applicator: Applicator) -> None:
    """A trigger that sets everything to black sets at least one pixel to black."""
    assert (applicator(torch.ones(2, 3, 32, 32), torch.zeros_like) == 0).any()


def test_random_values_come_from_its_seed(applicator_name: str) -> None:
    """Two objects with the same options stamp the same, and torch's global generator is neither used nor seeded."""
    images, stamped = batch(3, 3, 32, 32), []
    for seed in (1, 2, 3, 4):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        stamped.append(make("applicator", applicator_name)(images, torch.zeros_like))
        assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    assert all(torch.equal(each, stamped[0]) for each in stamped), "draws at random, but not from its seed"


def test_the_results_of_the_trigger_are_not_written_to(applicator: Applicator) -> None:
    results = []

    def trigger(canvases: Tensor) -> Tensor:
        result = 1 - canvases
        results.append((result, result.clone()))
        return result

    applicator(batch(2, 3, 32, 32), trigger)
    assert all(torch.equal(*pair) for pair in results), "a result of the trigger was written to"


def test_images_do_not_mix(applicator: Applicator, trigger: Trigger) -> None:
    images = batch(5, 3, 16, 16)
    alone = torch.cat([applicator(image[None], trigger) for image in images])
    torch.testing.assert_close(applicator(images, trigger), alone, atol=1e-6, rtol=0)


def test_the_canvases_of_an_image_follow_each_other(applicator: Applicator) -> None:
    """Triggers that depend on the places of images rely on this, and on the same number of canvases per image."""
    values = torch.tensor([0.125, 0.25, 0.5, 1.0])
    calls = []

    def trigger(canvases: Tensor) -> Tensor:
        calls.append(canvases.clone())
        return 1 - canvases

    applicator(values.view(4, 1, 1, 1).expand(4, 3, 32, 32), trigger)
    for canvases in calls:
        count, rest = divmod(len(canvases), len(values))
        assert rest == 0, "the images have different numbers of canvases"
        expected = values.repeat_interleave(count).view(-1, 1, 1, 1).expand_as(canvases)
        assert torch.equal(canvases, expected), "a canvas is not of the image that it is expected of"


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_memory_layout_does_not_matter(applicator: Applicator, trigger: Trigger, layout: str) -> None:
    plain = batch(2, 3, 16, 16)
    if layout == "channels_last":
        images = plain.contiguous(memory_format=torch.channels_last)
    else:
        images = torch.stack((plain, 1 - plain), dim=-1)[..., 0]
    torch.testing.assert_close(applicator(images, trigger), applicator(plain, trigger), atol=1e-6, rtol=0)


def test_no_images(applicator: Applicator, trigger: Trigger) -> None:
    assert applicator(torch.rand(0, 3, 32, 32), trigger).shape == (0, 3, 32, 32)


def test_gradients_reach_the_images(applicator: Applicator) -> None:
    images = batch(2, 3, 16, 16).requires_grad_()
    applicator(images, lambda x: x * 0.5).sum().backward()
    assert (images.grad != 0).any()


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None])
def test_invalid_images_are_refused(applicator: Applicator, images: object) -> None:
    with pytest.raises(ShapeError, match="images: expected"):
        applicator(images, lambda x: x)


def test_invalid_output_of_a_trigger_is_refused(applicator: Applicator) -> None:
    for broken in (lambda x: x * 2 + 5, lambda x: x.double()):
        with pytest.raises(ShapeError, match=type(applicator).__name__):
            applicator(batch(2, 3, 32, 32), broken)


def test_unknown_options_are_refused_by_name(applicator_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make("applicator", applicator_name, no_such_option=1)
