"""The trigger of Adaptive-Blend (Qi et al., ICLR 2023): in training, only pieces of the picture are blended in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.ops.ranges import check_integer, check_interval
from backdoorbench_moe.ops.seeding import derive_seed, uniform_at
from backdoorbench_moe.options import FilePath
from backdoorbench_moe.triggers.blend import Blend

MOST_PIECES = 256


class AdaptiveBlend(Blend):
    """Blend a picture into the image; in training, with a lower weight and only random pieces of the picture.

    The canvas is cut into `pieces` x `pieces` pieces. The training form blends the picture into a share `keep` of them,
    drawn for each image, with the weight `training_ratio`. The test form blends in the full picture with the weight
    `ratio`. The attack also needs a cover group: `--set poison.cover=0.3%`.

    Args:
        ratio: Weight of the picture in the test form, in (0, 1].
        training_ratio: Weight of the picture in the training form, in (0, 1].
        pieces: Number of pieces along each side, from 1 to 256. In a canvas with fewer pixels, some pieces are missing.
        keep: Share of the pieces that are kept, in (0, 1]. Their number is rounded, and at least 1.
        image: Path of a picture file. By default, the picture of this package, since the paper's, a cartoon character,
            cannot be distributed.
        seed: Seed of the pieces.

    Raises:
        ConfigError: A value is out of range, or the file is missing, damaged or not an 8-bit picture.

    Source:
        Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023, and its code.
    """

    _name = "adaptive-blend"

    def __init__(
        self,
        *,
        ratio: float = 0.2,
        training_ratio: float = 0.15,
        pieces: int = 4,
        keep: float = 0.5,
        image: FilePath | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(ratio=ratio, image=image, seed=seed)
        for name, value in (("training_ratio", training_ratio), ("keep", keep)):
            check_interval(f"adaptive-blend: {name}", value, "(0, 1]")
        check_integer("adaptive-blend: pieces", pieces, 1, MOST_PIECES)
        self.training_ratio, self.pieces, self.keep = training_ratio, pieces, keep

    def stamp_training(self, images: Tensor, places: Tensor) -> Tensor:
        """Blend the pieces that are drawn for each image's place with the weight `training_ratio`."""
        kept = self._kept(places.to(images.device)).to(images.dtype)
        mask = F.interpolate(kept, images.shape[-2:], mode="nearest")
        return torch.lerp(images, self._resize(images).expand_as(images), self.training_ratio * mask)

    def _kept(self, places: Tensor) -> Tensor:
        """Return which pieces are kept, (B, 1, pieces, pieces) bool: those with the smallest random numbers."""
        total = self.pieces**2
        drawn = uniform_at(derive_seed(self.seed, "adaptive-blend"), places, total)
        ranks = drawn.argsort(dim=1, stable=True).argsort(dim=1)
        return (ranks < max(1, round(self.keep * total))).view(-1, 1, self.pieces, self.pieces)
