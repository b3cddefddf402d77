"""The applicator of BadPatches, which stamps every square tile of the image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.patches import tile, untile


class PatchApplicator(Applicator):
    """Stamp every tile of the image, as in BadPatches.

    The image is cut into square tiles, each tile is stamped as if it were an image, and the tiles are reassembled.

    Args:
        patch_size: Side of a tile in pixels, a divisor of the image's height and width. To stamp every patch that the
            model routes, set it to the patch size of the model, even if the trigger is smaller.

    Raises:
        ConfigError: `patch_size` is below 1.

    Source:
        BadPatches (arXiv 2505.01811), section 3.
    """

    def __init__(self, *, patch_size: int = 4) -> None:
        super().__init__()
        if patch_size < 1:
            raise ConfigError.expected("patch: patch_size", "a positive number of pixels", patch_size)
        self.patch_size = patch_size

    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp every tile of the images, all in one call of `trigger`.

        Args:
            images: (B, C, H, W) float in [0, 1].
            trigger: Function that stamps tiles, (N, C, patch_size, patch_size) float in [0, 1].

        Returns:
            (B, C, H, W), the stamped images.

        Raises:
            ShapeError: `patch_size` does not divide the image's height and width.
        """
        return untile(trigger(tile(images, self.patch_size)), *images.shape[-2:])
