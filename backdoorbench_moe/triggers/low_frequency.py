"""A smooth pattern, a training-free variant of the low-frequency trigger (Zeng et al., ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.ops.frequency import smooth_field
from backdoorbench_moe.ops.ranges import check_integer, check_interval
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.triggers.canvas import LEVELS, Additive

MOST_WAVES = 1024


class LowFrequency(Additive):
    """Add a smooth random pattern without high frequencies, by which many triggers can be detected.

    The pattern of each channel is a sum of the lowest cosine waves with normally distributed amplitudes, drawn once
    from `seed`, without a constant term. It is scaled so that its largest absolute value is `strength`.

    Departures: the low-frequency (LF) attack optimises its pattern on a trained model, with a limit on high
    frequencies; this pattern is random. LF's pattern for CIFAR-10 has values between 0 and 51, so a white image would
    not change; this one has values between -`strength` and `strength`, at the default a range of the same width.

    Args:
        strength: Largest change of a pixel in levels of 8-bit images, in (0, 255].
        waves: Number of waves along each axis, from 2 to 1024: 0, 1, ..., `waves` - 1 half-waves. A canvas with fewer
            pixels gets only as many waves as pixels.
        seed: Seed of the amplitudes.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021.
    """

    def __init__(self, *, strength: float = 25.5, waves: int = 4, seed: int = 0) -> None:
        super().__init__(seed=seed)
        check_interval("low-frequency: strength", strength, "(0, 255]")
        check_integer("low-frequency: waves", waves, 2, MOST_WAVES)
        self.strength, self.waves = strength, waves

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Return the pattern, (C, H, W) float64; all 0 for an image of one pixel."""
        amplitudes = torch.stack([self._amplitudes(channel) for channel in range(channels)])
        field = smooth_field(amplitudes, height, width)
        largest = field.abs().amax((1, 2), keepdim=True)
        return self.strength / LEVELS * field / largest.clamp(min=torch.finfo(field.dtype).tiny)

    def _amplitudes(self, channel: int) -> Tensor:
        """Return the amplitudes of a channel's waves, (waves, waves) float64, with 0 for the constant."""
        rng = generator(self.seed, "low-frequency", channel)
        drawn = torch.randn(self.waves, self.waves, generator=rng, dtype=torch.float64)
        drawn[0, 0] = 0
        return drawn
