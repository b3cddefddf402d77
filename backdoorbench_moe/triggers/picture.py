"""The pictures that triggers blend in: read from a file, or drawn here."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, DataError, ShapeError
from backdoorbench_moe.image_files import read_image
from backdoorbench_moe.ops.images import LUMA
from backdoorbench_moe.paths import expand

SIDE = 128
LIGHT = ((255, 220, 30), (255, 170, 200), (255, 255, 245), (120, 235, 255))
DARK = ((190, 0, 30), (20, 30, 170), (0, 85, 40), (80, 10, 110))
INK = (20, 15, 40)


@functools.cache
def draw_quilt() -> Tensor:
    """Draw a smiling face on a dotted patchwork quilt. All calls return the same tensor, which must not be changed.

    Light and dark patches alternate on a 4x4 board, so that even a tile of 4x4 pixels shows some structure. Only
    integers are used, so the picture is the same on every machine.

    Returns:
        (1, 3, 128, 128) float32 in [0, 1].
    """
    picture = torch.empty(3, SIDE, SIDE, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for row in range(4):
        for column in range(4):
            colours = LIGHT if (row + column) % 2 == 0 else DARK
            patch = (y // 32 == row) & (x // 32 == column)
            _paint(picture, patch, colours[(row + 2 * column) % 4])
            _paint(picture, patch & _disc(x % 16, y % 16, 8, 8, 4), colours[(row + 2 * column + 2) % 4])
    face = _disc(x, y, 64, 64, 54)
    smile = _disc(x, y, 64, 66, 34) & ~_disc(x, y, 64, 62, 31) & (y > 70)
    eyes = _disc(x, y, 46, 50, 8) | _disc(x, y, 82, 50, 8)
    _paint(picture, (face & ~_disc(x, y, 64, 64, 50)) | smile | eyes, INK)
    return picture.unsqueeze(0).float() / 255


def read_picture(path: str, trigger: str = "blend") -> Tensor:
    """Read a picture file in the same way as the images of a data set, see `image_files.decode`.

    Args:
        path: The file. A leading "~" is replaced by the home directory.
        trigger: Name of the trigger with the option `image`, for error messages.

    Returns:
        (1, 3, H, W) float32 in [0, 1].

    Raises:
        ConfigError: The file is missing or damaged, or cannot be converted to 8-bit RGB without loss.
    """
    file = expand(path, f"{trigger}: image")
    if not file.is_file():
        raise ConfigError.expected(f"{trigger}: image", "a picture file", path)
    try:
        pixels = np.array(read_image(file))
    except DataError as error:
        raise ConfigError(f"{trigger}: image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255


def fit_picture(picture: Tensor, channels: int, height: int, width: int, trigger: str) -> Tensor:
    """Resize a picture bilinearly with antialiasing; for images with one channel, convert it to grey.

    Args:
        picture: (N, 3, h, w) float32 in [0, 1].
        channels: Number of channels of the images, 1 or 3.
        height: H.
        width: W.
        trigger: Name of the trigger, for error messages.

    Returns:
        (N, channels, H, W) float32 in [0, 1].

    Raises:
        ShapeError: `channels` is not 1 or 3.
    """
    if channels not in (1, 3):
        raise ShapeError(f"{trigger}: expected images of 1 or 3 channels, got {channels}")
    resized = F.interpolate(picture, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    if channels == 3:
        return resized
    weights = torch.tensor(LUMA, dtype=torch.float32).view(1, 3, 1, 1)
    return (resized * weights).sum(1, keepdim=True)


def _disc(x: Tensor, y: Tensor, centre_x: int, centre_y: int, radius: int) -> Tensor:
    return (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2


def _paint(picture: Tensor, where: Tensor, colour: tuple[int, int, int]) -> None:
    picture[:, where] = torch.tensor(colour, dtype=torch.uint8)[:, None]
