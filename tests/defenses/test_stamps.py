"""What stamps do to images, against other implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.applicators import create_applicator
from backdoorbench_moe.defenses.stamps import blend_pattern, canvas_side, displace_pixels, stamp_all
from backdoorbench_moe.testing.making import batch, used_model

IMAGES = batch(3, 3, 8, 12)
FORMS = {"mask": blend_pattern, "warp": displace_pixels}


def drawn(form: str, height: int, width: int) -> Tensor:
    """Two stamps: masks and patterns in [0, 1], or displacements in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    channels, low = {"mask": (4, 0), "warp": (2, -1)}[form]
    return low + (1 - low) * torch.rand(2, channels, height, width, generator=generator)


def stamped_by_hand(form: str, canvases: Tensor, values: Tensor) -> Tensor:
    """Stamp canvases with one stamp (channels, h, w), with torch's own sampling for displacements."""
    if form == "mask":
        return canvases * (1 - values[:1]) + values[1:] * values[:1]
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


def test_gradients_of_mask_and_pattern() -> None:
    images, values = batch(2, 3, 4, 8).double(), drawn("mask", 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: stamp_all(blend_pattern, images, values, 4), values)


def test_no_displacement_is_no_change_and_one_pixel_is_the_next() -> None:
    values = torch.zeros(2, 2, 8, 12)
    values[1, 1] = 1.0
    found = stamp_all(displace_pixels, IMAGES, values, None)
    torch.testing.assert_close(found[0], IMAGES)
    torch.testing.assert_close(found[1, ..., :-1], IMAGES[..., 1:])
    torch.testing.assert_close(found[1, ..., -1], IMAGES[..., -1])


def test_a_canvas_of_one_pixel() -> None:
    for form in FORMS:
        found = stamp_all(FORMS[form], IMAGES, drawn(form, 1, 1), 1)
        assert found.shape == (2, *IMAGES.shape) and found.isfinite().all()


def test_the_side_of_a_tile() -> None:
    pmoe, dense = used_model("pmoe"), used_model("wide_resnet")
    assert canvas_side("image", None, pmoe, 32) is None
    assert canvas_side("patch", None, pmoe, 32) == pmoe.patch_size == 4
    assert canvas_side("patch", None, dense, 32) == 4
    assert canvas_side("patch", 8, dense, 32) == 8
    pmoe.patch_size = 16
    assert canvas_side("patch", None, pmoe, 32) == 16
