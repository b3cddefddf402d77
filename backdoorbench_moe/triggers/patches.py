"""The trigger of Adaptive-Patch (Qi et al., ICLR 2023): one of four patches in training, two of them at test time."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.canvas import PerCanvas
from backdoorbench_moe.triggers.picture import fit_picture

# Side of a drawn patch in pixels, and the two colours of each patch. Their mean is a strong colour, not black, white or
# grey, so that a patch of one pixel is visible in all images.
SIDE = 8
COLOURS = (
    ((255, 200, 0), (200, 30, 0)),
    ((0, 230, 255), (0, 20, 190)),
    ((150, 255, 60), (0, 110, 30)),
    ((255, 120, 230), (120, 0, 140)),
)


class Patches(Trigger):
    """Stamp patches into the corners: one of four, semi-transparent, in training; two of them, opaque, at test time.

    The four patches are in the upper left, upper right, lower right and lower left corner, and scale with the image or
    tile. The training form stamps one of them, drawn for each image with equal probability, with the opacity of this
    patch. The attack also needs a cover group: `--set poison.cover=0.6%`.

    Departures: the paper's patches are two trademarks, a 3x3 checkerboard and a square, which this package may not
    distribute. Instead, it draws a ring, stripes, a checkerboard and a framed square, all of them in corners. The paper
    gives each patch to exactly a quarter of the images; here, the patch of an image is drawn. Both patches of the test
    form are also stamped in training; in the paper's code, one of the two is a variant that is not.

    Args:
        size: Side of a patch as a share of the shorter side of the image or tile, in (0, 0.5]; at least one pixel.
        opacities: Opacity of each of the four patches in the training form, in (0, 1].
        test_patches: Numbers of the patches that the test form stamps, in 0..3.
        test_opacity: Their opacity, in (0, 1].
        seed: Seed of the choice of the patch for each image.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023, and its code.
    """

    def __init__(
        self,
        *,
        size: float = 0.25,
        opacities: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3),
        test_patches: tuple[int, ...] = (0, 2),
        test_opacity: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        check_interval("patches: size", size, "(0, 0.5]")
        if len(opacities) != 4 or not all(0 < value <= 1 for value in opacities):
            raise ConfigError.expected("patches: opacities", "four numbers in (0, 1]", opacities)
        allowed = set(test_patches) <= {0, 1, 2, 3} and len(set(test_patches)) == len(test_patches)
        if not test_patches or not allowed:
            raise ConfigError.expected("patches: test_patches", "different numbers in 0..3", test_patches)
        check_interval("patches: test_opacity", test_opacity, "(0, 1]")
        self.size, self.opacities = size, tuple(opacities)
        self.test_patches, self.test_opacity = tuple(test_patches), test_opacity
        self._layers = PerCanvas(self._make)

    def stamp(self, images: Tensor) -> Tensor:
        """Stamp the patches of the test form, one after the other.

        Raises:
            ShapeError: The images have neither 1 nor 3 channels.
        """
        layers = self._layers(images)
        stamped = images
        for patch in self.test_patches:
            picture, mask = layers[:2, patch]
            stamped = stamped * (1 - self.test_opacity * mask) + self.test_opacity * mask * picture
        return stamped.clamp(0, 1).to(images.dtype)

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Stamp one patch, drawn for each image's place, with its own opacity."""
        drawn = uniform_at(derive_seed(self.seed, "patches"), places.to(images.device))
        picture, mask, opacity = self._layers(images)[:, (4 * drawn).long()]
        return (images * (1 - opacity * mask) + opacity * mask * picture).clamp(0, 1).to(images.dtype)

    def _make(self, channels: int, height: int, width: int) -> Tensor:
        """Return picture, mask and opacity of each patch, (3, 4, channels, H, W) float32."""
        side = max(1, round(self.size * min(height, width)))
        patches = fit_picture(draw_patches(), channels, side, side, "patches")
        layers = torch.zeros(3, 4, channels, height, width, dtype=torch.float32)
        for patch, (row, column) in enumerate(
            ((0, 0), (0, width - side), (height - side, width - side), (height - side, 0))
        ):
            inside = (patch, slice(None), slice(row, row + side), slice(column, column + side))
            layers[0][inside], layers[1][inside] = patches[patch], 1
            layers[2, patch] = self.opacities[patch]
        return layers


def draw_patches() -> Tensor:
    """Draw the four patches: a ring, stripes, a checkerboard and a framed square, (4, 3, 8, 8) float32."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distance = (2 * y - SIDE + 1) ** 2 + (2 * x - SIDE + 1) ** 2
    shapes = torch.stack(
        [
            (distance < 49) & (distance > 9),
            (x + y) // 2 % 2 == 0,
            (x // 2 + y // 2) % 2 == 0,
            torch.minimum(x, y).gt(1) & torch.maximum(x, y).lt(SIDE - 2),
        ]
    )
    colours = torch.tensor(COLOURS, dtype=torch.float32) / 255
    light, dark = colours[:, :, :, None, None].unbind(1)
    return torch.where(shapes[:, None], light, dark)
