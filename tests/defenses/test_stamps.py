"""What stamps do to images, against other implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.defenses.stamps import FORMS, canvas_side, stamp_all
from backdoorbench_moe.testing.making import batch, used_model

IMAGES = batch(3, 3, 8, 12)


def drawn(form: str, height: int, width: int, *, count: int = 2) -> Tensor:
    """Values in the range of the form, (count, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    return FORMS[form].values(torch.randn(count, FORMS[form].channels, height, width, generator=generator))


def stamped_by_hand(form: str, canvases: Tensor, values: Tensor) -> Tensor:
    """Stamp canvases with one stamp (channels, h, w), with torch's own sampling for displacements."""
    if form == "mask":
        return canvases * (1 - values[:1]) + values[1:] * values[:1]
    if form == "additive":
        return (canvases + values).clamp(0, 1)
    height, width = values.shape[1:]
    y = torch.arange(height)[:, None] + values[0]
    x = torch.arange(width) + values[1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    grid = grid.expand(len(canvases), -1, -1, -1)
    return F.grid_sample(canvases, grid, padding_mode="border", align_corners=True)


@pytest.mark.parametrize("form", FORMS)
def test_stamps_on_the_image(form) -> None:
    values = drawn(form, 8, 12)
    found = stamp_all(FORMS[form], IMAGES, values, None)
    expected = torch.stack([stamped_by_hand(form, IMAGES, each) for each in values])
    assert not torch.equal(expected[0], IMAGES)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_stamps_by_patch_are_what_the_applicator_stamps(form) -> None:
    values = drawn(form, 4, 4)
    found = stamp_all(FORMS[form], IMAGES, values, 4)
    applicator = create_applicator("patch", patch_size=4)
    for each, stamped in zip(values, found, strict=True):
        expected = applicator(IMAGES, lambda tiles, each=each: stamped_by_hand(form, tiles, each))
        torch.testing.assert_close(stamped, expected)


@pytest.mark.parametrize("form", FORMS)
def test_free_variables_become_values_in_range(form) -> None:
    free = 5 * torch.randn(2, FORMS[form].channels, 6, 6, generator=torch.Generator().manual_seed(0))
    values = FORMS[form].values(free)
    assert values.min() >= (0 if form == "mask" else -1) and values.max() <= 1
    assert (FORMS[form].sizes(values) <= 36).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form) -> None:
    free = torch.randn(2, FORMS[form].channels, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    images = batch(2, 3, 4, 8).double()
    function = lambda free: stamp_all(FORMS[form], images, FORMS[form].values(0.3 * free), 4)  # noqa: E731
    assert torch.autograd.gradcheck(function, free.requires_grad_())


def test_sizes_by_hand() -> None:
    """A quarter of 4x4 pixels: opaque; a difference of 1 in one colour of three; moved along one axis of two."""
    whole = {"mask": 4.0, "additive": 4 / 3, "warp": 2.0}
    for form, size in whole.items():
        values = torch.zeros(1, FORMS[form].channels, 4, 4)
        values[:, 0, :2, :2] = 1
        assert FORMS[form].sizes(values).tolist() == pytest.approx([size])


def test_no_displacement_is_no_change_and_one_pixel_is_the_next() -> None:
    values = torch.zeros(2, 2, 8, 12)
    values[1, 1] = 1.0
    found = stamp_all(FORMS["warp"], IMAGES, values, None)
    torch.testing.assert_close(found[0], IMAGES)
    torch.testing.assert_close(found[1, ..., :-1], IMAGES[..., 1:])
    torch.testing.assert_close(found[1, ..., -1], IMAGES[..., -1])


def test_a_canvas_of_one_pixel() -> None:
    for form in FORMS:
        found = stamp_all(FORMS[form], IMAGES, drawn(form, 1, 1), 1)
        assert found.shape == (2, *IMAGES.shape) and found.isfinite().all()


def test_the_side_of_a_tile() -> None:
    pmoe, dense = used_model("pmoe"), used_model("wide_resnet")
    assert canvas_side("image", None, pmoe) is None
    assert canvas_side("patch", None, pmoe) == pmoe.patch_size == 4
    assert canvas_side("patch", None, dense) == 4
    assert canvas_side("patch", 8, dense) == 8
    pmoe.patch_size = 16
    assert canvas_side("patch", None, pmoe) == 16
