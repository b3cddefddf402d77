"""A trigger from a third-party package: the sinusoidal stripes of Barni et al. (ICIP 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers.base import Trigger


class Sinusoid(Trigger):
    """Vertical stripes, added to every channel: amplitude * cos(2 pi * frequency * column / width).

    amplitude: in (0, 1], the paper's 20 of 255 by default. frequency: periods across the canvas, from 1.
    The paper has a sine; a cosine is the same but for its phase, and is not all zeros on a tile of four
    columns, as six periods of a sine are. Raises ConfigError for a value out of range.
    """

    def __init__(self, *, amplitude: float = 20 / 255, frequency: int = 6, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 < amplitude <= 1:
            raise ConfigError.expected("sinusoid: amplitude", "a number in (0, 1]", amplitude)
        if frequency < 1:
            raise ConfigError.expected("sinusoid: frequency", "at least 1 period", frequency)
        self.amplitude, self.frequency = amplitude, frequency

    def stamp(self, images: Tensor) -> Tensor:
        """Add the stripes; gradients flow where the sum stays within [0, 1]."""
        turns = torch.arange(images.shape[-1], device=images.device) * self.frequency / images.shape[-1]
        stripes = self.amplitude * torch.cos(2 * math.pi * turns)
        return (images + stripes.to(images.dtype)).clamp(0, 1)
