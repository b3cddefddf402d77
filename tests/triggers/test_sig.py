"""SIG against its formula, written out for each pixel, and in a tile of four."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger


@pytest.mark.parametrize("delta", [40.0, 30.0])
def test_the_formula_for_each_pixel(delta: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    expected = np.empty((3, 32, 32))
    for channel, row, column in np.ndindex(3, 32, 32):
        wave = delta * math.sin(2 * math.pi * column * 6 / 32)
        expected[channel, row, column] = min(255, max(0, pixels[channel, row, column] + wave))
    stamped = create_trigger("sig", delta=delta)(torch.from_numpy(pixels / 255)[None])[0]
    np.testing.assert_allclose(stamped * 255, expected, atol=1e-9)


def test_four_pixels_get_one_wave() -> None:
    """Six waves in four pixels would be sin(3 pi j) = 0."""
    assert all(abs(math.sin(2 * math.pi * j * 6 / 4)) < 1e-12 for j in range(4))
    stamped = create_trigger("sig")(torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64))
    row = [0.5, 0.5 + 40 / 255, 0.5, 0.5 - 40 / 255]
    torch.testing.assert_close(stamped, torch.tensor(row, dtype=torch.float64).expand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0}, r"sig: delta: expected a number in \(0, 255\], got 0"),
        ({"delta": 256}, "sig: delta"),
        ({"frequency": 0}, "sig: frequency: expected a positive number, got 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("sig", **options)
