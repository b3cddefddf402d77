"""The smooth pattern: its spectrum by SciPy's DCT, its range, and its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import create_trigger


def pattern(size: int, **options: object) -> np.ndarray:
    grey = torch.full((1, 3, size, size), 0.5, dtype=torch.float64)
    return ((create_trigger("low-frequency", **options)(grey) - grey)[0] * 255).numpy()


@pytest.mark.parametrize("size", [4, 16, 32, 64])
@pytest.mark.parametrize("waves", [2, 4])
def test_only_the_lowest_frequencies_without_a_constant_up_to_the_strength(size: int, waves: int) -> None:
    for channel in pattern(size, strength=20, waves=waves, seed=3):
        assert np.abs(channel).max() == pytest.approx(20)
        found = dctn(channel, norm="ortho")
        assert abs(found[0, 0]) < 1e-9 < 1 < np.abs(found[:waves, :waves]).max()
        found[:waves, :waves] = 0
        assert np.abs(found).max() < 1e-9


def test_a_tile_has_the_pattern_of_the_image_in_small() -> None:
    """Averages of 8x8 pixels of the image's pattern, up to the scale."""
    small, large = pattern(4, waves=3), pattern(32, waves=3).reshape(3, 4, 8, 4, 8).mean((2, 4))
    for one, other in zip(small, large, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.97


def test_channels_and_seeds_have_patterns_of_their_own() -> None:
    first, other = pattern(8, seed=1), pattern(8, seed=2)
    assert np.abs(first[0] - first[1]).max() > 5 and np.abs(first - other).max() > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 300}, "low-frequency: strength"),
        ({"waves": 1}, "low-frequency: waves"),
        ({"waves": 10**6}, "low-frequency: waves: expected an integer from 2 to 1024, got 1000000"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("low-frequency", **options)
