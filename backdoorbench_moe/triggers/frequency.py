"""The triggers of FTrojan (Wang et al., 2022) and CTRL (Li et al., 2023): a few frequencies of the chroma channels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, ShapeError, UnknownNameError
from backdoorbench_moe.ops.frequency import dct_image
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.triggers.canvas import LEVELS, Additive

Space = Literal["ycrcb", "yuv"]
# Change of red, green and blue if both chroma channels are raised by one level (ITU-R BT.601). YCrCb: R = Y + 1.403 Cr,
# G = Y - 0.714 Cr - 0.344 Cb, B = Y + 1.773 Cb; YUV: R = Y + 1.140 V, G = Y - 0.395 U - 0.581 V, B = Y + 2.032 U.
CHROMA = {"ycrcb": (1.403, -1.058, 1.773), "yuv": (1.140, -0.976, 2.032)}
# The window for which strengths are published.
PUBLISHED_WINDOW = 32
STRENGTHS = "[0.001, 10000]"


class Frequency(Additive):
    """Raise a few frequencies of the two chroma channels in every window of the image, as in FTrojan.

    In each window of n x n pixels, `strength` is added to the coefficients (n / 2 - 1, n / 2 - 1) and
    (n - 1, n - 1) of the orthonormal DCT-II of both chroma channels: (15, 15) and (31, 31) in windows of 32. Both
    conversions and the transform are linear, so this is the same as adding a fixed pattern to red, green and blue. The
    sum is clipped to [0, 255]. The three channels are changed in different directions, so black and white pixels
    change as well, in the channels that are not clipped.

    Departures: a window is at most as large as the image or tile, and smaller if it is cut off by the edge. The
    strength is scaled by n / 32, so that pixels change by the same amount in a window of any size. Nothing is rounded
    before the trigger is added, while FTrojan's code truncates the chroma channels to integers.

    CTRL's trigger is `space="yuv"`, `training_strength=50` and `strength=100`, with clean labels.

    Args:
        window: Side of a window in pixels, at least 1.
        strength: Increase of a coefficient in windows of 32, in levels of 8-bit images, from 0.001 to 10000; 30 in
            BackdoorBench, 20 in some of FTrojan's experiments.
        training_strength: Strength of the training form, in the same range; `strength` if None.
        positions: Which coefficients are raised, as shares s of the window, in (0, 1]: the coefficient (k, k) with
            k = round(s n) - 1, at least 0.
        space: "ycrcb" as in FTrojan, or "yuv" as in CTRL.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: A value is out of range.
        UnknownNameError: `space` is unknown.

    Source:
        FTrojan: Wang et al., "An Invisible Black-box Backdoor Attack through Frequency Domain", ECCV 2022. CTRL:
        Li et al., "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023.
    """

    def __init__(
        self,
        *,
        window: int = 32,
        strength: float = 30.0,
        training_strength: float | None = None,
        positions: tuple[float, ...] = (0.5, 1.0),
        space: Space = "ycrcb",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if window < 1:
            raise ConfigError.expected("frequency: window", "a positive number of pixels", window)
        for name, value in (("strength", strength), ("training_strength", training_strength)):
            if value is not None:
                check_interval(f"frequency: {name}", value, STRENGTHS)
        if not positions or not all(0 < share <= 1 for share in positions):
            raise ConfigError.expected("frequency: positions", "numbers in (0, 1]", positions)
        if space not in get_args(Space):
            raise UnknownNameError("frequency: space", space, get_args(Space))
        self.window, self.strength, self.training_strength = window, strength, training_strength
        self.positions, self.space = tuple(positions), space

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Add the pattern with `training_strength`."""
        strength = self.strength if self.training_strength is None else self.training_strength
        return self.add(images, strength / self.strength)

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Return the pattern of all windows in red, green and blue, (3, H, W) float64.

        Raises:
            ShapeError: The images do not have 3 channels.
        """
        if channels != 3:
            raise ShapeError(f"frequency: expected images of 3 channels, got {channels}")
        rows = [torch.cat([self._window(h, w) for w in self._cut(width)], dim=1) for h in self._cut(height)]
        colours = torch.tensor(CHROMA[self.space], dtype=torch.float64).view(3, 1, 1)
        return self.strength / LEVELS * colours * torch.cat(rows)

    def _cut(self, length: int) -> list[int]:
        """Return the lengths of the windows along an axis."""
        return [min(self.window, length - start) for start in range(0, length, self.window)]

    def _window(self, height: int, width: int) -> Tensor:
        """Return the sum of the frequencies in one window, (h, w), scaled to its size."""
        scale = (height * width) ** 0.5 / PUBLISHED_WINDOW
        waves = [
            dct_image(height, width, *(max(0, round(share * side) - 1) for side in (height, width)))
            for share in self.positions
        ]
        return scale * torch.stack(waves).sum(0)
