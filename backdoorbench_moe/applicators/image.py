"""The applicator that stamps the full image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator


class ImageApplicator(Applicator):
    """Apply the trigger to the full image, as attacks before BadPatches do."""

    def __init__(self) -> None:
        super().__init__()

    def apply(self, images: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
        """Stamp the full images."""
        return trigger(images)
