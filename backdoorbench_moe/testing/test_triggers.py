"""Conformance tests of triggers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError, UnknownNameError
from backdoorbench_moe.testing.making import batch, make
from backdoorbench_moe.triggers.base import Trigger

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CANVASES = [(4, 4), (5, 7), (8, 8), (32, 32), (48, 40), (64, 64)]


Form = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def trigger(trigger_name: str) -> Trigger:
    return make("trigger", trigger_name, seed=7)


def forms(trigger: Trigger) -> dict[str, Form]:
    """Return the forms that take places: the training form, and the noise form if the trigger has one."""
    return {"training": trigger.training, **({"noise": trigger.noise} if trigger.has_noise else {})}


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_type_and_range(trigger: Trigger, canvas: tuple[int, int], dtype: torch.dtype) -> None:
    images = batch(3, 3, *canvas, dtype=dtype)
    images[0], images[1] = 0, 1
    before = images.clone()
    stamped = trigger(images)
    assert (stamped.shape, stamped.dtype, stamped.device) == (images.shape, dtype, images.device)
    assert stamped.min() >= 0 and stamped.max() <= 1
    assert torch.equal(images, before), "the input was written to"
    assert not torch.equal(stamped, images), "nothing was stamped"


def test_the_output_is_not_the_input(trigger: Trigger) -> None:
    images = batch(2, 3, 32, 32)
    before = images.clone()
    trigger(images).zero_()
    assert torch.equal(images, before), "the output shares memory with the input, or the input was written to"


def test_the_same_seed_stamps_the_same(trigger_name: str) -> None:
    images = batch(2, 3, 32, 32)
    torch.manual_seed(1)
    first = make("trigger", trigger_name, seed=3)(images)
    torch.manual_seed(2)
    again = make("trigger", trigger_name, seed=3)(images)
    assert torch.equal(again, first), "draws at random, but not from its seed"


def test_the_default_dtype_does_not_matter(trigger_name: str) -> None:
    """The default dtype when a trigger is built does not matter."""
    images, places = batch(2, 3, 16, 16), torch.tensor([9, 2])

    def stamped() -> dict[str, Tensor]:
        trigger = make("trigger", trigger_name, seed=3)
        found = {name: form(images, places) for name, form in forms(trigger).items()}
        return {"test": trigger(images), **found}

    expected, dtype = stamped(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = stamped()
    finally:
        torch.set_default_dtype(dtype)
    for name, images in found.items():
        torch.testing.assert_close(images, expected[name], atol=1e-5, rtol=0, msg=f"{name} form")


def test_a_trigger_has_no_memory(trigger_name: str) -> None:
    images, tiles = batch(2, 3, 32, 32), batch(9, 3, 4, 4)
    used = make("trigger", trigger_name)
    for other in (tiles, tiles.double(), images.bfloat16()):
        used(other)
    assert torch.equal(used(images), make("trigger", trigger_name)(images))


@pytest.mark.parametrize("canvas", [(4, 4), (32, 32)])
def test_images_do_not_mix(trigger: Trigger, canvas: tuple[int, int]) -> None:
    images = batch(7, 3, *canvas)
    alone = torch.cat([trigger(image[None]) for image in images])
    torch.testing.assert_close(trigger(images), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(trigger(images.flip(0)), alone.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_memory_layout_does_not_matter(trigger: Trigger, layout: str) -> None:
    plain = batch(2, 3, 16, 16)
    if layout == "channels_last":
        images = plain.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        images = torch.stack((plain, 1 - plain), dim=-1)[..., 0]
    else:
        images = plain[:1].expand(4, -1, -1, -1)
        plain = images.contiguous()
    before = images.clone()
    torch.testing.assert_close(trigger(images), trigger(plain), atol=1e-6, rtol=0)
    assert torch.equal(images, before)


def test_no_images(trigger: Trigger) -> None:
    assert trigger(torch.rand(0, 3, 32, 32)).shape == (0, 3, 32, 32)


def test_gradients_reach_the_images(trigger: Trigger) -> None:
    images = batch(2, 3, 16, 16).requires_grad_()
    trigger(images).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad != 0).float().mean() > 0.5


def test_inference_mode_leaves_nothing_behind(trigger: Trigger) -> None:
    images = batch(2, 3, 16, 16)
    with torch.inference_mode():
        stamped = trigger(images)
    assert torch.equal(trigger(images.requires_grad_()).detach(), stamped)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.full((1, 3, 8, 8), 255.0),
        torch.full((1, 3, 8, 8), -1.0),
        torch.full((1, 3, 8, 8), float("nan")),
        [[0.5]],
    ],
    ids=["3d", "uint8", "0-255", "negative", "nan", "list"],
)
def test_invalid_images_are_refused(trigger: Trigger, images: object) -> None:
    with pytest.raises(ShapeError, match="images: expected"):
        trigger(images)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_keep_shape_type_and_range(
    trigger: Trigger, canvas: tuple[int, int], dtype: torch.dtype
) -> None:
    images, places = batch(3, 3, *canvas, dtype=dtype), torch.tensor([5, 0, 70_000])
    images[0], images[1] = 0, 1
    before = images.clone()
    for name, form in forms(trigger).items():
        stamped = form(images, places)
        assert (stamped.shape, stamped.dtype, stamped.device) == (images.shape, dtype, images.device), name
        assert stamped.min() >= 0 and stamped.max() <= 1, name
        assert torch.equal(images, before), f"{name}: the input was written to"
        assert not torch.equal(stamped, images), f"{name}: nothing was stamped"
        stamped.zero_()
        assert torch.equal(images, before), f"{name}: the output shares memory with the input"
        assert torch.equal(places, torch.tensor([5, 0, 70_000])), f"{name}: the places were written to"


def test_forms_depend_on_the_place_and_not_on_the_batch(trigger: Trigger) -> None:
    """Images are stamped the same if the batch is permuted together with its places, or split."""
    images, places = batch(6, 3, 8, 8), torch.tensor([3, 41, 0, 5, 1_281_166, 6])
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    for name, form in forms(trigger).items():
        whole = form(images, places)

        def assert_same(stamped: Tensor, expected: Tensor, name: str = name) -> None:
            torch.testing.assert_close(
                stamped, expected, atol=1e-6, rtol=0, msg=f"{name} depends on the batch"
            )

        assert_same(form(images[order], places[order]), whole[order])
        for size in (1, 4):
            pairs = zip(images.split(size), places.split(size), strict=True)
            assert_same(torch.cat([form(*pair) for pair in pairs]), whole)
        assert_same(form(images, places), whole)


def test_the_same_seed_stamps_the_same_in_all_forms(trigger_name: str) -> None:
    images, places = batch(3, 3, 16, 16), torch.tensor([9, 2, 4])
    torch.manual_seed(1)
    first = {
        name: form(images, places) for name, form in forms(make("trigger", trigger_name, seed=3)).items()
    }
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for name, form in forms(make("trigger", trigger_name, seed=3)).items():
        assert torch.equal(form(images, places), first[name]), (
            f"{name} draws at random, but not from its seed"
        )
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


def test_the_noise_form_is_another_stamp_than_the_triggers(trigger: Trigger) -> None:
    images, places = batch(3, 3, 32, 32), torch.tensor([9, 2, 4])
    if trigger.has_noise:
        stamped = trigger.noise(images, places)
        for mine, triggers in ((stamped, trigger(images)), (stamped, trigger.training(images, places))):
            assert not torch.equal(mine, triggers), "a model cannot tell the noise form from the trigger"
    else:
        with pytest.raises(ConfigError, match=f"{type(trigger).__name__} has no noise form"):
            trigger.noise(images, places)


def test_forms_stamp_no_images(trigger: Trigger) -> None:
    for form in forms(trigger).values():
        assert form(torch.rand(0, 3, 32, 32), torch.empty(0, dtype=torch.int64)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "places",
    [torch.tensor([1]), torch.tensor([1, 2, 3]), torch.tensor([[1], [2]]), torch.tensor([0.5, 1.0]), [1, 2]],
    ids=["too few", "too many", "2d", "float", "list"],
)
def test_invalid_places_are_refused(trigger: Trigger, places: object) -> None:
    for form in (trigger.training, trigger.noise):
        with pytest.raises(ShapeError, match="places: expected"):
            form(batch(2, 3, 8, 8), places)


def test_unknown_options_are_refused_by_name(trigger_name: str) -> None:
    with pytest.raises(UnknownNameError, match="no_such_option"):
        make("trigger", trigger_name, no_such_option=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_stamps_what_the_cpu_stamps(trigger: Trigger) -> None:
    images = batch(4, 3, 32, 32)
    torch.testing.assert_close(trigger(images.cuda()).cpu(), trigger(images), atol=1e-5, rtol=0)
