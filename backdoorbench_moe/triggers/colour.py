"""A colour filter as a trigger."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.ops.ranges import check_positive
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.canvas import PerCanvas

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


class Colour(Trigger):
    """Change the colours of all pixels in the same way, like a filter of a photo app.

    Red, green and blue of each pixel are mixed by a 3x3 matrix and clipped at 0. Each channel is then raised to the
    power `gamma`, multiplied by `gain`, increased by `offset`, and clipped to [0, 1]. No filter is canonical in the
    literature. The default is a warm one: it changes black, white and grey, and clips nothing.

    Since every pixel is changed independently, the trigger is the same on the image and in every tile.

    Args:
        gain: Factor of red, green and blue, at least 0.
        offset: Offset of red, green and blue, in [-1, 1].
        gamma: Exponent of red, green and blue, above 0.
        matrix: The 3x3 matrix, row by row: the first three numbers are the weights of the new red.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Ours.
    """

    def __init__(
        self,
        *,
        gain: tuple[float, float, float] = (0.9, 0.95, 0.85),
        offset: tuple[float, float, float] = (0.1, 0.0, 0.0),
        gamma: tuple[float, float, float] = (1.0, 1.0, 1.0),
        matrix: tuple[float, ...] = IDENTITY,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        for name, values, low, high in (("gain", gain, 0, math.inf), ("offset", offset, -1, 1)):
            if len(values) != 3 or not all(low <= value <= high and math.isfinite(value) for value in values):
                limits = "of at least 0" if name == "gain" else "in [-1, 1]"
                raise ConfigError.expected(f"colour: {name}", f"three numbers {limits}", values)
        if len(gamma) != 3:
            raise ConfigError.expected("colour: gamma", "three numbers above 0", gamma)
        for value in gamma:
            check_positive(**{"colour: gamma": value})
        if len(matrix) != 9 or not all(map(math.isfinite, matrix)):
            raise ConfigError.expected("colour: matrix", "nine numbers, row by row", matrix)
        self.gain, self.offset, self.gamma, self.matrix = map(tuple, (gain, offset, gamma, matrix))
        self._values = PerCanvas(self._table)

    def stamp(self, images: Tensor) -> Tensor:
        """Change the colours; gradients flow to all pixels that are not clipped.

        Raises:
            ShapeError: The images do not have 3 channels.
        """
        if images.shape[1] != 3:
            raise ShapeError(f"colour: expected images of 3 channels, got {images.shape[1]}")
        matrix, (gain, offset, gamma) = self._values(images).split(3)
        wide = images.to(gain.dtype)
        if self.matrix != IDENTITY:
            wide = torch.einsum("ij,bjhw->bihw", matrix[..., 0, 0], wide)
        if self.gamma != (1.0, 1.0, 1.0):
            # The smallest positive number instead of 0, where the gradient of a power below 1 is infinite.
            wide = wide.clamp(min=torch.finfo(wide.dtype).tiny) ** gamma
        return (wide.clamp(min=0) * gain + offset).clamp(0, 1).to(images.dtype)

    def _table(self, channels: int, height: int, width: int) -> Tensor:
        """Return the matrix, then gain, offset and gamma of each channel, (6, 3, 1, 1) float64."""
        rows = (*self.matrix, *self.gain, *self.offset, *self.gamma)
        return torch.tensor(rows, dtype=torch.float64).view(6, 3, 1, 1)
