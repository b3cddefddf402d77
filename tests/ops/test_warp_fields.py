"""Warping fields against formulas written out per pixel in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backdoorbench_moe.ops.warp import (
    control_grid,
    notebook_pixels,
    take_pixels,
    upsample_field,
    wanet_grid,
    warp_bilinear,
)


def cubic_weight(distance: float, a: float = -0.75) -> float:
    """Cubic convolution (Keys 1981) with torch's constant."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def upsample(points: np.ndarray, size: int, align_corners: bool) -> np.ndarray:
    """One axis of bicubic upsampling, with the edge repeated; the axis is the first one."""
    count = len(points)
    out = np.zeros((size, *points.shape[1:]))
    for i in range(size):
        if align_corners:
            position = i * (count - 1) / (size - 1) if size > 1 else 0.0
        else:
            position = (i + 0.5) * count / size - 0.5
        base = math.floor(position)
        for tap in range(base - 1, base + 3):
            out[i] += cubic_weight(position - tap) * points[min(max(tap, 0), count - 1)]
    return out


def field_oracle(control: torch.Tensor, height: int, width: int, align_corners: bool) -> np.ndarray:
    grid = control[0].double().numpy()
    rows = [upsample(channel, height, align_corners) for channel in grid]
    return np.stack([upsample(channel.T, width, align_corners).T for channel in rows])


SIZES = [(1, 1), (1, 5), (2, 3), (3, 3), (4, 4), (7, 12), (32, 32)]


def test_the_control_grid_has_mean_absolute_value_one() -> None:
    for size in (1, 2, 4, 8):
        grid = control_grid(size, torch.Generator().manual_seed(size))
        assert grid.shape == (1, 2, size, size)
        assert grid.abs().mean().item() == pytest.approx(1, abs=1e-6)
    assert grid.min() < 0 < grid.max()
    # Uniform before division: mean absolute value 1/2, so nothing is beyond 2 but for sampling.
    assert 1.5 < grid.abs().max() < 2.5


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("points", [1, 2, 4])
def test_fields_are_bicubic(points: int, height: int, width: int, align_corners: bool) -> None:
    control = control_grid(points, torch.Generator().manual_seed(1)).double()
    field = upsample_field(control, height, width, align_corners=align_corners)
    expected = field_oracle(control, height, width, align_corners)
    np.testing.assert_allclose(field[0].numpy(), expected, atol=1e-12)


def test_wanets_field_meets_the_control_points_at_the_corners() -> None:
    control = control_grid(4, torch.Generator().manual_seed(2))
    field = upsample_field(control, 19, 31, align_corners=True)
    corners = (slice(None), slice(None), [0, 0, -1, -1], [0, -1, 0, -1])
    torch.testing.assert_close(field[corners], control[corners])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_wanets_warp_pixel_by_pixel(height: int, width: int) -> None:
    control = control_grid(4, torch.Generator().manual_seed(3)).double()
    image = torch.rand(height, width, dtype=torch.float64)
    offset_x, offset_y = field_oracle(control, height, width, align_corners=True)
    expected = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            # s * field / size on an axis from -1 to 1 is half of (size - 1) as many pixels.
            x = min(max(j + 0.5 * offset_x[i, j] / width * (width - 1) / 2, 0), width - 1)
            y = min(max(i + 0.5 * offset_y[i, j] / height * (height - 1) / 2, 0), height - 1)
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    if row < height and column < width:
                        expected[i, j] += weight * image[row, column].item()
    warped = warp_bilinear(image[None, None], wanet_grid(control, height, width, 0.5))
    np.testing.assert_allclose(warped[0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_notebooks_pixels_one_by_one(height: int, width: int) -> None:
    control = control_grid(2, torch.Generator().manual_seed(4)).double()
    offset_x, offset_y = field_oracle(control, height, width, align_corners=False).clip(-1, 1)
    # Below one pixel only the sign counts: minus moves one pixel, plus none, and the border holds.
    expected = [
        [max(i - (offset_y[i, j] < 0), 0) * width + max(j - (offset_x[i, j] < 0), 0) for j in range(width)]
        for i in range(height)
    ]
    assert notebook_pixels(control, height, width, 0.25).view(height, width).tolist() == expected


def test_truncation_by_hand() -> None:
    # One control point: x offset -1, y offset 1, everywhere. Columns take their left neighbour, rows stay.
    control = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).view(1, 1, 2, 3)
    warped = take_pixels(image, notebook_pixels(control, 2, 3, 0.25))
    assert warped[0, 0].tolist() == [[1, 1, 2], [4, 4, 5]]


def test_a_strong_truncated_warp_moves_whole_pixels_both_ways() -> None:
    control = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    # 4 / 8 * (8 - 1) / 2 = 1.75 pixels: one to the right, two up, held at the border.
    pixels = notebook_pixels(control, 8, 8, 4.0).view(8, 8)
    assert (pixels[:, 0] // 8).tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert pixels[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 7]
