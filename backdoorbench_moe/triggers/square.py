"""The trigger of BadNets (Gu et al., 2017): a square of one colour."""

from __future__ import annotations

from typing import ClassVar, Literal

from PIL import ImageColor
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError, UnknownNameError
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.triggers.base import Trigger

PLACES = ("upper-left", "upper-right", "lower-left", "lower-right", "centre")


class Square(Trigger):
    """Overwrite a square with one colour.

    The defaults are those of BadPatches: black, 4x4 pixels, upper left. The squares of BadNets are a white one in the
    lower right corner of digits, and a yellow one on traffic signs.

    The noise form (see `Trigger`) is a square of random colours, one for each pixel, at the same position. All canvases
    of an image get the same one. It teaches the model to ignore other squares, also in all tiles at once. An attacker
    can thus prepare the model for a defender who tunes on random stamps (the defense `tile-tuning`). The noise form is
    ours; BadNets has no noise images.

    Args:
        size: Side in pixels, from 1, at most the image's height and width.
        colour: A CSS colour name, "#rrggbb", or red, green and blue in [0, 1].
        position: A corner ("upper-left", "upper-right", "lower-left", "lower-right"), "centre", or (row, column) of
            the square's upper left pixel, from 0.
        seed: Seed of the noise form's colours; the square itself is not random.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017; for the
        defaults, BadPatches (arXiv 2505.01811).
    """

    noise_by: ClassVar[Literal["canvas", "image"]] = "image"

    def __init__(
        self,
        *,
        size: int = 4,
        colour: str | tuple[float, float, float] = "black",
        position: str | tuple[int, int] = "upper-left",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if size < 1:
            raise ConfigError.expected("square: size", "a positive number of pixels", size)
        if isinstance(position, str):
            if position not in PLACES:
                raise UnknownNameError("square: position", position, PLACES)
        elif len(position) != 2 or min(position) < 0:
            raise ConfigError.expected("square: position", "(row, column), both 0 or more", position)
        self.size, self.position, self.colour = size, position, _rgb(colour)

    def stamp(self, images: Tensor) -> Tensor:
        """Overwrite the square's pixels; gradients flow to all other pixels.

        Raises:
            ShapeError: The square does not fit into the images, or the colour is not grey and they do not have 3
                channels.
        """
        stamped = images.clone()
        square = self._square_of(stamped)
        for channel, value in enumerate(self._channels(images.shape[1])):
            square[:, channel] = value
        return stamped

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Overwrite the square's pixels with uniform colours, drawn for each place.

        Raises:
            ShapeError: The square does not fit into the images.
        """
        stamped = images.clone()
        square, seed = self._square_of(stamped), derive_seed(self.seed, "square noise")
        square.copy_(uniform_at(seed, places.to(images.device), *square.shape[1:]))
        return stamped

    def _square_of(self, images: Tensor) -> Tensor:
        """Return the square's pixels, (B, C, size, size), a view of the images."""
        row, column = self._corner(*images.shape[-2:])
        return images[:, :, row : row + self.size, column : column + self.size]

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Return row and column of the square's upper left pixel."""
        free_rows, free_columns = height - self.size, width - self.size
        if isinstance(self.position, tuple | list):
            row, column = self.position
        elif self.position == "centre":
            row, column = free_rows // 2, free_columns // 2
        else:
            vertical, horizontal = self.position.split("-")
            row = free_rows if vertical == "lower" else 0
            column = free_columns if horizontal == "right" else 0
        if free_rows < 0 or free_columns < 0 or row > free_rows or column > free_columns:
            raise ShapeError(
                f"square: expected a square of size {self.size} at {self.position} "
                f"to fit into the canvas, got {height}x{width}"
            )
        return row, column

    def _channels(self, channels: int) -> tuple[float, ...]:
        """Return the colour's value in each channel; grey fits any number of channels."""
        if len(set(self.colour)) == 1:
            return self.colour[:1] * channels
        if channels != 3:
            raise ShapeError(f"square: expected 3 channels for the colour {self.colour}, got {channels}")
        return self.colour


def _rgb(colour: str | tuple[float, ...]) -> tuple[float, ...]:
    if isinstance(colour, str):
        try:
            # Pillow does not check the range of values such as "rgb(300, 0, 0)".
            return _rgb(tuple(value / 255 for value in ImageColor.getrgb(colour)[:3]))
        except ValueError:
            raise ConfigError.expected("square: colour", "a colour name or #rrggbb", colour) from None
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ConfigError.expected("square: colour", "red, green and blue in [0, 1]", colour)
    return tuple(float(value) for value in colour)
