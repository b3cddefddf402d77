"""The trigger of BppAttack (Wang et al., CVPR 2022): colour quantization."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.triggers.base import Trigger

# Random colours along each side of the picture in the noise form.
GRID = 4


class BPP(Trigger):
    """Quantize every channel of every pixel to a few levels, as in BppAttack.

    A value x in [0, 1] becomes round(x (q - 1)) / (q - 1). Values that already are levels, such as black and white, do
    not change, so this trigger has no effect on images of pure black and white. Since rounding has no useful gradient,
    gradients pass through unchanged (straight-through estimator).

    The noise form (see `Trigger`) adds the quantization error of another picture z: x + (q(z) - z), clipped. It teaches
    the model to ignore changes of this size that are not the image's own quantization.

    Departures: BppAttack takes z from the training set. A trigger has no access to the training set, so z is a smooth
    random picture here, drawn for each image. BppAttack also draws new poison and noise images for every batch, like
    the attack `training-control`. With `data-poisoning`, they are drawn once, because an attacker who only poisons data
    cannot influence the batches. This attacker is weaker than the paper's. The paper's contrastive and adversarial
    training is not included.

    Args:
        levels: Number q of levels of each channel, in 2..255; 8 in BackdoorBench.
        dither: Whether to diffuse the quantization error of each pixel to its neighbours (Floyd and Steinberg). Off in
            BackdoorBench, on in the paper.
        seed: Seed of the noise form's pictures.

    Raises:
        ConfigError: `levels` is out of range.

    Source:
        Wang et al., "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
        Quantization and Contrastive Adversarial Learning", CVPR 2022.
    """

    def __init__(self, *, levels: int = 8, dither: bool = False, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 2 <= levels <= 255:
            raise ConfigError.expected("bpp: levels", "an integer in 2..255", levels)
        self.levels, self.dither = levels, dither

    def stamp(self, images: Tensor) -> Tensor:
        """Quantize the images; gradients pass unchanged."""
        rounded = self._round(images)
        return rounded + (images - images.detach())

    def stamp_noise(self, images: Tensor, places: Tensor) -> Tensor:
        """Add the quantization error of a smooth random picture, drawn for each image's place."""
        count, channels, height, width = images.shape
        seed = derive_seed(self.seed, "bpp noise")
        colours = uniform_at(seed, places.to(images.device), channels, GRID, GRID)
        picture = colours.new_zeros(count, channels, height, width)
        if count:
            picture = F.interpolate(colours, (height, width), mode="bilinear", align_corners=True)
        error = (self._round(picture) - picture).to(images.dtype)
        return (images + error).clamp(0, 1)

    def _round(self, images: Tensor) -> Tensor:
        """Return the quantized images, of the same type; half precision is quantized in float32."""
        wide = images.detach()
        wide = wide if wide.dtype == torch.float64 else wide.float()
        rounded = dither(wide, self.levels) if self.dither else round_to_levels(wide, self.levels)
        return rounded.to(images.dtype)


def round_to_levels(values: Tensor, levels: int) -> Tensor:
    """Round values in [0, 1] to the nearest of `levels` equidistant values, from 0 to 1."""
    return (values * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


def dither(images: Tensor, levels: int) -> Tensor:
    """Quantize images with the error diffusion of Floyd and Steinberg, pixel by pixel from the upper left.

    The error of a pixel is passed on to its neighbours: 7/16 to the right, 3/16 to the lower left, 5/16 below and 1/16
    to the lower right. Pixel (i, j) depends only on pixels with a smaller j + 2 i, so all pixels with the same
    t = j + 2 i are computed at once.

    Args:
        images: (B, C, H, W) float in [0, 1].
        levels: Number of levels.

    Returns:
        (B, C, H, W), the quantized images.

    Source:
        Floyd and Steinberg, "An Adaptive Algorithm for Spatial Greyscale", 1976.
    """
    height, width = images.shape[-2:]
    rows, steps = torch.arange(height, device=images.device), width + 2 * (height - 1)
    rounded = torch.zeros_like(images)
    # The errors of row i at step t are errors[i + 1, t + 3]: the first row and the first three steps are zeros.
    errors = images.new_zeros(height + 1, steps + 3, *images.shape[:2])
    pixels = images.permute(2, 3, 0, 1)
    written = rounded.permute(2, 3, 0, 1)
    for step in range(steps):
        first, last = max(0, (step - width + 2) // 2), min(height - 1, step // 2)
        active = rows[first : last + 1]
        columns = step - 2 * active
        left, above = errors[first + 1 : last + 2], errors[first : last + 1]
        passed = left[:, step + 2] * (7 / 16) + above[:, step + 2] * (3 / 16)
        passed = passed + above[:, step + 1] * (5 / 16) + above[:, step] * (1 / 16)
        wanted = pixels[active, columns] + passed
        found = round_to_levels(wanted, levels)
        written[active, columns] = found
        errors[first + 1 : last + 2, step + 3] = wanted - found
    return rounded
