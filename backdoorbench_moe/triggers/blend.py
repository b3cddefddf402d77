"""The blended picture (Chen et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.triggers.base import Trigger
from backdoorbench_moe.triggers.picture import LUMA, draw_quilt, read_picture


class Blend(Trigger):
    """(1 - ratio) * image + ratio * picture, the picture resized to the canvas.

    ratio: in (0, 1]; the paper's is 0.5. image: path of a picture file; by default a picture of our own
    (the paper's Hello Kitty is not ours to ship). seed: as every trigger has one; a blend draws nothing.
    Raises ConfigError for a ratio out of range or a file that is missing, damaged or of a wrong mode, and
    ShapeError when called on images of neither 1 nor 3 channels.
    """

    def __init__(self, *, ratio: float = 0.5, image: FilePath | None = None, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 < ratio <= 1:
            raise ConfigError.expected("blend: ratio", "a number in (0, 1]", ratio)
        self.ratio, self.image = ratio, image
        self._picture = None if image is None else read_picture(image)
        self._resized: dict[object, Tensor] = {}

    @property
    def picture(self) -> Tensor:
        """The picture as it is, (1, 3, H, W) float32 in [0, 1]; our own is drawn when first asked for."""
        if self._picture is None:
            self._picture = draw_quilt()
        return self._picture

    def stamp(self, images: Tensor) -> Tensor:
        """Blend the picture into every image; gradients flow with weight 1 - ratio."""
        return torch.lerp(images, self._resize(images), self.ratio)

    def _resize(self, images: Tensor) -> Tensor:
        """The picture for this canvas (bilinear, antialiased), where and as precise as the images are."""
        channels, size = images.shape[1], images.shape[-2:]
        if channels not in (1, 3):
            raise ShapeError(f"blend: expected images of 1 or 3 channels, got {channels}")
        key = (channels, size, images.device, images.dtype)
        if key not in self._resized:
            # Made in inference mode, a picture could never take part in a backward pass.
            with torch.inference_mode(False):
                resized = F.interpolate(self.picture, size, mode="bilinear", antialias=True).clamp(0, 1)
                if channels == 1:
                    resized = (resized * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
                self._resized[key] = resized.to(images.device, images.dtype)
        return self._resized[key]
