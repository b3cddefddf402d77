"""BPP against NumPy's rounding, and against Floyd and Steinberg's error diffusion pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.bpp import BPP


@pytest.mark.parametrize("levels", [2, 5, 8, 255])
def test_the_published_formula(levels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8))
    expected = np.round(pixels / 255 * (levels - 1)) / (levels - 1) * 255
    stamped = create_trigger("bpp", levels=levels)(torch.from_numpy(pixels / 255))
    np.testing.assert_allclose(stamped * 255, expected, atol=1e-9)


def floyd_steinberg(image: np.ndarray, levels: int) -> np.ndarray:
    """One channel, in loops."""
    values, (height, width) = image.copy(), image.shape
    for i in range(height):
        for j in range(width):
            old = values[i, j]
            values[i, j] = min(1.0, max(0.0, np.round(old * (levels - 1)) / (levels - 1)))
            error = old - values[i, j]
            for row, column, weight in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + row < height and 0 <= j + column < width:
                    values[i + row, j + column] += error * weight / 16
    return values


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1), (4, 4), (5, 7), (16, 9)])
@pytest.mark.parametrize("levels", [2, 8])
def test_dithering_is_floyd_and_steinbergs(size: tuple[int, int], levels: int) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(levels))
    stamped = BPP(levels=levels, dither=True)(images)
    for found, image in zip(stamped.flatten(0, 1), images.flatten(0, 1), strict=True):
        np.testing.assert_allclose(found, floyd_steinberg(image.numpy(), levels), atol=1e-12)


def test_dithering_keeps_the_mean() -> None:
    image = torch.full((1, 1, 64, 64), 0.3)
    assert abs(BPP(levels=2, dither=True)(image).mean() - 0.3) < 0.01 < abs(BPP(levels=2)(image).mean() - 0.3)


@pytest.mark.parametrize("dither", [False, True])
def test_noise_is_a_rounding_error_of_the_same_size_but_not_the_images_own(dither: bool) -> None:
    """The error of a picture that crosses the levels evenly is uniform, of the standard deviation step / sqrt(12)."""
    trigger, step = BPP(dither=dither, seed=3), 1 / 7
    images, places = torch.full((64, 3, 32, 32), 0.5), torch.arange(64)
    added = trigger.noise(images, places) - images
    if not dither:
        assert added.abs().max() <= step / 2 + 1e-6
        assert abs(added.std() / (step / 12**0.5) - 1) < 0.05
    assert abs(added.mean()) < 0.1 * step
    own = trigger(images) - images
    assert (added - own).abs().mean() > 0.2 * step
    assert len(torch.unique(added.flatten(1), dim=0)) == 64


def test_noise_adds_what_rounding_changes_in_a_picture() -> None:
    """x + (q(z) - z): the picture z, from which the error is worked out here, plus the error is a level."""
    images, places = torch.full((4, 3, 32, 32), 0.5), torch.arange(4)
    added = BPP(levels=8, seed=3).noise(images, places) - images
    colours = uniform_at(derive_seed(3, "bpp noise"), places, 3, 4, 4)
    picture = F.interpolate(colours, (32, 32), mode="bilinear", align_corners=True)
    torch.testing.assert_close(added, (7 * picture).round() / 7 - picture, rtol=0, atol=1e-6)


def test_noise_in_tiles_differs_from_tile_to_tile() -> None:
    tiles = torch.full((64, 3, 4, 4), 0.5)
    added = BPP(seed=1).noise(tiles, torch.arange(64)) - tiles
    assert added.abs().amax((1, 2, 3)).min() > 0.02 and len(torch.unique(added.flatten(1), dim=0)) == 64


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    (3 * BPP()(images)).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 3))


@pytest.mark.parametrize("levels", [1, 256])
def test_bad_levels(levels: int) -> None:
    with pytest.raises(ConfigError, match=r"bpp: levels: expected an integer in 2\.\.255"):
        create_trigger("bpp", levels=levels)
