"""BadPatches (arXiv 2505.01811): the trigger on every tile of the image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.patches import tile, untile


class PatchApplicator(Applicator):
    """Cut the image into tiles, stamp each as an image of its own, put them back (BadPatches § 3).

    patch_size: side of a tile in pixels, a divisor of the image's sides; best the size of the model's own
    patches, whatever the trigger's size. Raises ConfigError if it is below 1, and ShapeError when called
    on an image that it does not tile.
    """

    def __init__(self, *, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size < 1:
            raise ConfigError.expected("patch: patch_size", "a positive number of pixels", patch_size)
        self.patch_size = patch_size

    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp every tile in one batch."""
        return untile(trigger(tile(images, self.patch_size)), *images.shape[-2:])
