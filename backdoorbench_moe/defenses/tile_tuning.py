"""Tuning on clean images with random stamps and true labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.random_stamps import Tiles, stamp_at_random
from backdoorbench_moe.defenses.requirements import check_tuning
from backdoorbench_moe.defenses.stamped_tuning import stamped_objective
from backdoorbench_moe.defenses.stamps import ApplicatorName, canvas_side, check_patch_size
from backdoorbench_moe.ops.ranges import check_interval


class TileTuning(Defense):
    """Tune the model on clean images with true labels, some of which get a new random stamp in every batch.

    All tiles of an image get the same stamp, like a trigger of BadPatches. The model learns to ignore what all tiles
    have in common, without a search for the trigger. This is the baseline of `neural-cleanse` with
    `applicator="patch"`.

    Args:
        tiles: The stamps. "opaque": single pixels, each with the same probability, which is drawn from [0, 0.5).
            "blend": a pattern that covers the tile, with an opacity in [0, 0.6). "warp": a displacement of each pixel
            by up to one pixel along each axis. "mixed": all three, on one third of the stamped images each.
        saturated: Probability in [0, 1] that all values of a stamp's colours are 0 or 1. Otherwise, they are uniform.
        applicator: "patch", or "image" for one stamp on the full image.
        patch_size: With "patch", the side of the tile in pixels, a divisor of the image's height and width. None: that
            of the model's patches, or 4 for a model without patches.
        epochs: Epochs of tuning, from 1.
        share: Share of each batch that is stamped, in (0, 1].
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the tiles do not cover the images.

    Source:
        Ours.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        tiles: Tiles = "mixed",
        saturated: float = 0.0,
        applicator: ApplicatorName = "patch",
        patch_size: int | None = None,
        epochs: int = 40,
        share: float = 0.5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_interval("share", share, "(0, 1]")
        check_interval("saturated", saturated, "[0, 1]")
        check_patch_size(applicator, patch_size)
        self.tiles, self.saturated = tiles, saturated
        self.applicator, self.patch_size = applicator, patch_size
        self.epochs, self.share, self.lr = epochs, share, lr

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if the tiles do not cover the images."""
        canvas_side(self.applicator, self.patch_size, model, image_size)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Tune."""
        side = canvas_side(self.applicator, self.patch_size, task.model, task.image_size)
        stamp = partial(stamp_at_random, self.tiles, side, saturated=self.saturated)
        objective = stamped_objective(stamp, self.share, task.train.label_smoothing)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, objective=objective, augment=True)
        return DefenseResult("tuned", task.model)
