"""The trigger of SIG (Barni et al., 2019): a sinusoidal signal along the rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorbench_moe.ops.ranges import check_interval, check_positive
from backdoorbench_moe.triggers.canvas import LEVELS, Additive


class SIG(Additive):
    """Add vertical stripes: a sinusoid along each row, the same in all rows and channels.

    Pixel j of a row of W pixels is changed by delta * sin(2 pi j f / W), and clipped to [0, 255].

    Departure: f is at most W / 4, that is, one wave in four pixels. In a tile of 4 pixels, the published f = 6 would
    give sin(3 pi j) = 0, which is no trigger.

    The published attack poisons images of the target class and keeps their labels (`--labels clean`).

    Args:
        delta: Amplitude in levels of 8-bit images, in (0, 255]; 40 in BackdoorBench, 30 in backdoor-toolbox.
        frequency: Number f of waves along a row, above 0.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019.
    """

    def __init__(self, *, delta: float = 40.0, frequency: float = 6.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        check_interval("sig: delta", delta, "(0, 255]")
        check_positive(**{"sig: frequency": frequency})
        self.delta, self.frequency = delta, frequency

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Return the stripes, (W,) float64."""
        waves = min(self.frequency, width / 4)
        steps = torch.arange(width, dtype=torch.float64)
        return self.delta / LEVELS * torch.sin(2 * math.pi * waves * steps / width)
