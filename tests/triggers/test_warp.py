"""The warp against WaNet's formula and against the BadPatches notebook, both written out here."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.triggers import create_trigger
from backdoorbench_moe.triggers.warp import Warp


def wanet(images: Tensor, control: Tensor, strength: float) -> Tensor:
    """WaNet's formula as published, for square images."""
    size = images.shape[-1]
    field = F.interpolate(control.to(images), size=size, mode="bicubic", align_corners=True)
    axis = torch.linspace(-1, 1, steps=size, dtype=images.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack((x, y), 2)[None] + strength * field.permute(0, 2, 3, 1) / size
    grid = torch.clamp(grid, -1, 1).repeat(len(images), 1, 1, 1)
    return F.grid_sample(images, grid, align_corners=True)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 32, 33, 64, 96, 224])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_is_wanets(size: int, dtype: torch.dtype) -> None:
    warp = create_trigger("warp", seed=size)
    images = torch.rand(3, 3, size, size, dtype=dtype)
    expected = wanet(images, warp.control_grid, 0.5)
    torch.testing.assert_close(warp(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [4, 32, 64])
def test_float32_is_as_good_as_float64(size: int) -> None:
    images = torch.rand(3, 3, size, size)
    warp = Warp(grid_size=4, strength=2.0, seed=1)
    expected = wanet(images.double(), warp.control_grid, 2.0)
    torch.testing.assert_close(warp(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_sampled_in_float32(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 32, 32).to(dtype)
    assert torch.equal(Warp()(images), Warp()(images.float()).to(dtype))


def test_the_warp_moves_the_picture() -> None:
    """The identity would satisfy many a test above; the mean shift is about strength / 2 pixels."""
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    shift = (Warp(strength=0.5)(ramp) - ramp).abs().mean() * 63
    assert 0.1 < shift < 0.4


def wanet_noise(images: Tensor, warp: Warp, places: list[int]) -> Tensor:
    """WaNet's noise mode image by image, in float64, as in its code: `ins = rand * 2 - 1; grid + ins / height`."""
    height, width = images.shape[-2:]
    count = height * width * 2
    axes = [torch.linspace(-1, 1, steps=n, dtype=torch.float64) for n in (height, width)]
    y, x = torch.meshgrid(*axes, indexing="ij")
    field = F.interpolate(
        warp.control_grid.double(), size=(height, width), mode="bicubic", align_corners=True
    )
    shift = warp.strength * field.permute(0, 2, 3, 1)
    size = torch.tensor([width, height], dtype=torch.float64)
    plain = torch.clamp(torch.stack((x, y), 2)[None] + shift / size, -1, 1)
    warped = []
    for image, place in zip(images.double(), places, strict=True):
        # The whole stream up to this image's draws: the place says where they start.
        stream = uniform_at(derive_seed(warp.seed, "warp noise"), torch.arange((place + 1) * count))
        ins = stream[place * count :].double().view(1, height, width, 2) * 2 - 1
        grid = torch.clamp(plain + ins / size, -1, 1)
        warped.append(F.grid_sample(image[None], grid, align_corners=True))
    return torch.cat(warped)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_form_is_wanets_noise_mode(size: tuple[int, int], dtype: torch.dtype) -> None:
    warp, images, places = Warp(seed=3), torch.rand(3, 3, *size, dtype=dtype), [7, 0, 2]
    expected = wanet_noise(images, warp, places)
    stamped = warp.noise(images, torch.tensor(places))
    torch.testing.assert_close(stamped.double(), expected, atol=2e-5, rtol=0)


def sampled_at(stamp: Callable[[Tensor], Tensor], count: int, height: int, width: int) -> Tensor:
    """The pixel (x, y) that each pixel was sampled at, (count, 2, H, W) in pixels, read from images of ramps."""
    y, x = torch.meshgrid(
        torch.linspace(0, 1, height, dtype=torch.float64),
        torch.linspace(0, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    ramps = torch.stack((x, y)).expand(count, -1, -1, -1)
    return stamp(ramps) * torch.tensor([width - 1, height - 1], dtype=torch.float64).view(1, 2, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_noise_moves_a_pixel_by_less_than_half_a_pixel_more_and_not_to_one_side(
    height: int, width: int
) -> None:
    """An offset of 1 / W on the axis [-1, 1] is half of (W - 1) / W pixels; uniform, so that its mean is zero."""
    warp, count = Warp(seed=5), 50
    plain = sampled_at(warp, count, height, width)
    noisy = sampled_at(lambda images: warp.noise(images, torch.arange(count)), count, height, width)
    more = noisy - plain
    most = torch.tensor([0.5 * (width - 1) / width, 0.5 * (height - 1) / height]).view(1, 2, 1, 1)
    assert (more.abs() <= most + 1e-5).all()
    # The warp and the noise together stay in the picture: away from its edges nothing is clamped.
    inner = more[..., 2:-2, 2:-2]
    assert (inner.amax((0, 2, 3)) > 0.99 * most.flatten()).all(), "the whole range is drawn from"
    assert (inner.amin((0, 2, 3)) < -0.99 * most.flatten()).all(), "the whole range is drawn from"
    # Uniform in [-m, m]: standard deviation m / sqrt(3); the mean of n draws stays within five of its own.
    n = inner[:, 0].numel()
    spread = most.flatten() / math.sqrt(3)
    assert (inner.mean((0, 2, 3)).abs() < 5 * spread / math.sqrt(n)).all()
    torch.testing.assert_close(inner.std((0, 2, 3)), spread.double(), rtol=0.02, atol=0)


def test_every_place_and_seed_has_noise_of_its_own() -> None:
    images = torch.rand(1, 3, 16, 16)
    warp, other = Warp(seed=3), Warp(seed=4)
    other.control_grid = warp.control_grid
    first, second = (warp.noise(images, torch.tensor([place])) for place in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(other.noise(images, torch.tensor([0])), first)
    assert torch.equal(warp.training(images, torch.tensor([1])), warp(images))


def test_the_notebooks_warp_has_no_noise_form() -> None:
    warp = create_trigger("warp", sampling="truncate")
    assert not warp.has_noise and create_trigger("warp").has_noise
    with pytest.raises(ConfigError, match=r"poison\.noise: the trigger Warp has no noise form"):
        warp.noise(torch.rand(2, 3, 8, 8), torch.arange(2))


def notebook(images: np.ndarray, control: np.ndarray, strength: float) -> np.ndarray:
    """The notebook's steps in loops: upsample, clamp, add, clamp, to pixels, truncate, take."""
    size = images.shape[-1]
    warped = np.empty_like(images)
    for i in range(size):
        for j in range(size):
            offset = [np.clip(cubic_at(plane, i, j, size), -1, 1) for plane in control]
            x, y = (
                -1 + 2 * p / (size - 1) + strength * o / size for p, o in zip((j, i), offset, strict=True)
            )
            x, y = (np.clip(value, -1, 1) for value in (x, y))
            # A hair is added where a coordinate is a whole pixel: floating point must not decide there.
            column, row = (int((value + 1) / 2 * (size - 1) + 1e-12) for value in (x, y))
            warped[:, :, i, j] = images[:, :, row, column]
    return warped


def cubic_at(plane: np.ndarray, i: int, j: int, size: int) -> float:
    """Bicubic value at pixel (i, j), half-pixel centres, edge repeated."""

    def taps(pixel: int) -> list[tuple[int, float]]:
        position = (pixel + 0.5) * len(plane) / size - 0.5
        found = []
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            d = abs(position - tap)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            found.append((min(max(tap, 0), len(plane) - 1), weight))
        return found

    return sum(a * b * plane[row, column] for row, a in taps(i) for column, b in taps(j))


@pytest.mark.parametrize("size", [4, 8, 32])
def test_truncate_is_the_notebooks(size: int) -> None:
    for seed in range(3):
        warp = create_trigger("warp", grid_size=2, strength=0.25, sampling="truncate", seed=seed)
        images = torch.rand(2, 3, size, size, dtype=torch.float64)
        expected = notebook(images.numpy(), warp.control_grid[0].double().numpy(), 0.25)
        np.testing.assert_array_equal(warp(images).numpy(), expected)


def test_truncate_does_not_depend_on_the_strength() -> None:
    """Below one pixel, that is: see the references on the notebook."""
    images = torch.rand(1, 3, 32, 32)
    weak, strong = (Warp(strength=s, sampling="truncate", seed=5)(images) for s in (1e-6, 0.9))
    assert torch.equal(weak, strong)
    assert not torch.equal(weak, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_truncate_takes_the_same_pixels_in_any_precision(dtype: torch.dtype) -> None:
    warp, images = Warp(sampling="truncate"), torch.rand(2, 3, 32, 32)
    assert torch.equal(warp(images.to(dtype)), warp(images).to(dtype))


def test_the_control_grid_is_drawn_once_from_the_seed() -> None:
    torch.manual_seed(0)
    first = create_trigger("warp", grid_size=4, strength=0.5, seed=3).control_grid
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = create_trigger("warp", grid_size=4, strength=0.5, seed=3).control_grid
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.shape == (1, 2, 4, 4)
    assert first.abs().mean().item() == pytest.approx(1, abs=1e-6)
    assert not torch.equal(first, Warp(seed=4).control_grid)


def test_channel_0_moves_along_x() -> None:
    warp = Warp(grid_size=1, strength=1.0)
    warp.control_grid = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    along_x = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).contiguous()
    along_y = along_x.mT.contiguous()
    assert torch.all(warp(along_x)[..., :-1] > along_x[..., :-1] + 0.01)
    torch.testing.assert_close(warp(along_y), along_y)


@pytest.mark.parametrize("sampling", ["bilinear", "truncate"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (24, 40)])
def test_odd_canvases(size: tuple[int, int], sampling: str) -> None:
    images = torch.rand(2, 3, *size)
    warped = create_trigger("warp", sampling=sampling)(images)
    if size == (1, 1):
        torch.testing.assert_close(warped, images)
    else:
        assert not torch.equal(warped, images)


def test_gradients_go_where_the_pixels_came_from() -> None:
    warp = Warp()
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(warp, images)


@pytest.mark.parametrize("sampling", ["bilinear", "truncate"])
def test_a_field_made_in_inference_mode_serves_training(sampling: str) -> None:
    warp, images = create_trigger("warp", sampling=sampling), torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        warp(images)
    warp(images.requires_grad_()).sum().backward()
    assert images.grad.sum().item() == pytest.approx(3 * 64, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 0}, "grid_size: expected an integer from 1"),
        ({"grid_size": 200_000}, "grid_size: expected an integer from 1 to 1024, got 200000"),
        ({"strength": 0}, "strength: expected a number above 0"),
        ({"strength": float("inf")}, "strength: expected"),
        ({"sampling": "bilinar"}, "sampling.*did you mean 'bilinear'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    for make in (Warp, lambda **given: create_trigger("warp", **given)):
        with pytest.raises(ConfigError, match=message):
            make(**options)
