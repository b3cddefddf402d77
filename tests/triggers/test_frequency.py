"""FTrojan's and CTRL's steps one by one with SciPy's DCT, against the one pattern that the trigger adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.triggers import create_trigger

# Luma, then the differences red - luma and blue - luma, scaled (ITU-R BT.601); and back.
SCALES = {"ycrcb": (0.713, 0.564), "yuv": (0.877, 0.492)}
BACK = {"ycrcb": (1.403, -0.714, -0.344, 1.773), "yuv": (1.140, -0.581, -0.395, 2.032)}


def published(image: np.ndarray, space: str, strength: float, window: int) -> np.ndarray:
    """Stamp (3, H, W) pixels of 0..255 whose sides are multiples of the window: convert, transform, add, and back."""
    red, green, blue = image
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    of_red, of_blue = SCALES[space]
    chroma = [(red - luma) * of_red, (blue - luma) * of_blue]
    for channel in chroma:
        for top in range(0, channel.shape[0], window):
            for left in range(0, channel.shape[1], window):
                part = np.s_[top : top + window, left : left + window]
                found = dctn(channel[part], norm="ortho")
                found[window // 2 - 1, window // 2 - 1] += strength
                found[window - 1, window - 1] += strength
                channel[part] = idctn(found, norm="ortho")
    first, second = chroma
    to_red, red_to_green, blue_to_green, to_blue = BACK[space]
    green = luma + red_to_green * first + blue_to_green * second
    return np.clip(np.stack([luma + to_red * first, green, luma + to_blue * second]), 0, 255)


@pytest.mark.parametrize("space", ["ycrcb", "yuv"])
@pytest.mark.parametrize(("size", "window"), [((32, 32), 32), ((64, 96), 32), ((4, 4), 4), ((8, 8), 4)])
def test_the_published_steps(space: str, size: tuple[int, int], window: int) -> None:
    """The strength goes with the window: 30 in 32 pixels, 3.75 in 4. The tables of 3 digits are not exact inverses."""
    image = np.random.default_rng(1).integers(0, 256, (3, *size)).astype(float)
    expected = published(image, space, 30 * window / 32, window)
    trigger = create_trigger("frequency", space=space, window=window)
    stamped = trigger(torch.from_numpy(image / 255)[None])[0] * 255
    np.testing.assert_allclose(stamped, expected, atol=0.25)
    assert np.abs(stamped.numpy() - image).max() > 3


def test_pixels_change_by_as_much_in_tiles_as_in_images() -> None:
    trigger = create_trigger("frequency")
    grey = [torch.full((1, 3, side, side), 0.5, dtype=torch.float64) for side in (4, 8, 16, 32)]
    changes = [((trigger(image) - image) ** 2).mean().sqrt() for image in grey]
    torch.testing.assert_close(torch.stack(changes), changes[0].expand(4), rtol=1e-6, atol=0)


def test_a_window_that_is_cut_off_is_a_smaller_window() -> None:
    trigger, image = create_trigger("frequency"), torch.full((1, 3, 32, 48), 0.5)
    torch.testing.assert_close(trigger(image)[..., :32], trigger(image[..., :32]))
    assert not torch.equal(trigger(image)[..., 32:], image[..., 32:])


def test_pixels_change_by_as_much_in_a_window_that_is_cut_off() -> None:
    image = torch.full((1, 3, 32, 48), 0.5, dtype=torch.float64)
    changes = (create_trigger("frequency")(image) - image).square()
    assert changes[..., 32:].mean().item() == pytest.approx(changes[..., :32].mean().item())


def test_training_with_half_of_the_strength_changes_half_as_much() -> None:
    trigger = create_trigger("frequency", space="yuv", strength=100, training_strength=50)
    images = torch.full((2, 3, 32, 32), 0.5)
    training = trigger.training(images, torch.arange(2)) - images
    torch.testing.assert_close(trigger(images) - images, 2 * training, atol=1e-6, rtol=0)


def test_positions_are_shares_of_the_window() -> None:
    """Share 0.25 of 32 is the coefficient (7, 7), and nothing else."""
    image = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    added = create_trigger("frequency", positions=(0.25,))(image) - image
    found = dctn(added[0, 2].numpy() * 255 / 1.773, norm="ortho")
    assert found[7, 7] == pytest.approx(30)
    found[7, 7] = 0
    assert np.abs(found).max() < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "frequency: window: expected a positive"),
        ({"strength": 0}, "frequency: strength: expected a number in"),
        ({"training_strength": -1}, "frequency: training_strength: expected a number in"),
        ({"strength": 1e9}, "frequency: strength: expected a number in"),
        ({"strength": 1e-9}, "frequency: strength: expected a number in"),
        ({"training_strength": 1e9}, "frequency: training_strength: expected a number in"),
        ({"positions": []}, "frequency: positions: expected numbers"),
        ({"positions": [0.5, 1.5]}, "frequency: positions: expected numbers"),
        ({"space": "yvu"}, "space: unknown 'yvu'; did you mean 'yuv'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_trigger("frequency", **options)


def test_grey_images_have_no_chroma() -> None:
    with pytest.raises(ShapeError, match="frequency: expected images of 3 channels, got 1"):
        create_trigger("frequency")(torch.rand(1, 1, 8, 8))
