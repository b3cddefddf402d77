"""The applicator of BadPatches, which stamps every tile of the image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.patches import tile, untile


class PatchApplicator(Applicator):
    """Stamp every tile of the image, as in BadPatches.

    The image is cut into tiles, each tile is stamped as if it were an image, and the tiles are put back.

    Args:
        patch_size: Side of a tile in pixels, a divisor of the image's height and width. It should be the size of the
            model's patches, independently of the trigger's size.

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
        """Stamp all tiles in one batch.

        Raises:
            ShapeError: `patch_size` does not divide the image's height and width.
        """
        return untile(trigger(tile(images, self.patch_size)), *images.shape[-2:])
