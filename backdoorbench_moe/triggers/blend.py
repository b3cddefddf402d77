"""The trigger of Blended (Chen et al., 2017): a picture that is blended into the image."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.canvas import PerCanvas
from backdoorbench_moe.triggers.picture import draw_quilt, fit_picture, read_picture


class Blend(Trigger):
    """Blend a picture into the image.

    The stamped image is (1 - ratio) * image + ratio * picture, with the picture resized to the size of the image.

    Args:
        ratio: Weight of the picture, in (0, 1]; 0.5 in BadPatches, 0.2 in BackdoorBench.
        image: Path of a picture file. By default, a picture of this package, since the Hello Kitty picture of the
            papers cannot be distributed.
        seed: Not used, as nothing is random.

    Raises:
        ConfigError: `ratio` is out of range, or the file is missing, damaged or not an 8-bit picture.

    Source:
        Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017; for the defaults,
        BadPatches (arXiv 2505.01811).
    """

    _name: ClassVar[str] = "blend"

    def __init__(self, *, ratio: float = 0.5, image: FilePath | None = None, seed: int = 0) -> None:
        super().__init__(seed=seed)
        check_interval(f"{self._name}: ratio", ratio, "(0, 1]")
        self.ratio, self.image = ratio, image
        self._picture = None if image is None else read_picture(image, self._name)
        self._resized = PerCanvas(self._fit)

    @property
    def picture(self) -> Tensor:
        """The picture in its original size, (1, 3, H, W) float32 in [0, 1]."""
        if self._picture is None:
            self._picture = draw_quilt()
        return self._picture

    def stamp(self, images: Tensor) -> Tensor:
        """Blend the picture into every image; gradients are scaled by 1 - ratio.

        Raises:
            ShapeError: The images have neither 1 nor 3 channels.
        """
        return torch.lerp(images, self._resize(images), self.ratio)

    def _resize(self, images: Tensor) -> Tensor:
        """Return the picture in the size, device and type of the images."""
        return self._resized(images).to(images.dtype)

    def _fit(self, channels: int, height: int, width: int) -> Tensor:
        return fit_picture(self.picture, channels, height, width, self._name)
