"""Fixed patterns that depend on the size of the images, cached for each size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from backdoorbench_moe.triggers.base import Trigger

# Published strengths, in levels of 8-bit images, are divided by this.
LEVELS = 255


class PerCanvas:
    """A pattern that depends on the size of the images only, cached for each size, device and precision.

    Args:
        make: Function of channels, height and width that returns the pattern as a tensor on the CPU.
    """

    def __init__(self, make: Callable[[int, int, int], Tensor]) -> None:
        self._make = make
        self._made: dict[object, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pattern for images (B, C, H, W), on their device: float64 for float64 images, else float32."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        key = (*images.shape[1:], images.device, dtype)
        if key not in self._made:
            # Tensors that are created in inference mode cannot take part in a backward pass later.
            with torch.inference_mode(False):
                self._made[key] = self._make(*images.shape[1:]).to(images.device, dtype)
        return self._made[key]


class Additive(Trigger):
    """Base class of triggers that add the same pattern to all images of a size.

    The sum is clipped to [0, 1]. The pattern has no effect where it would make a white pixel brighter or a black one
    darker. Patterns should therefore have values above and below 0, so that they change every image.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._patterns = PerCanvas(self.pattern)

    def stamp(self, images: Tensor) -> Tensor:
        """Add the pattern and clip; gradients flow to all pixels that are not clipped."""
        return self.add(images)

    def add(self, images: Tensor, factor: float = 1.0) -> Tensor:
        """Add the pattern times a factor to images (B, C, H, W), and clip to [0, 1]."""
        return (images + factor * self._patterns(images)).clamp(0, 1).to(images.dtype)

    @abstractmethod
    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """Return the pattern for images of a size: (C, H, W), or of a shape that broadcasts to it, on the CPU."""
