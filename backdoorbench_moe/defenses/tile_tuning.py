"""Tuning on clean images with random tiles stamped on them, and true labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.requirements import check_tuning
from backdoorbench_moe.defenses.stamped_tuning import check_share, stamped_objective
from backdoorbench_moe.defenses.stamps import (
    FORMS,
    ApplicatorName,
    Form,
    FormName,
    canvas_shape,
    canvas_side,
    stamp_all,
)


class TileTuning(Defense):
    """Tune the model on clean images, a part of which has a new random tile in every batch, with the true labels.

    The same tile is stamped on all tiles of an image, as a trigger of BadPatches is. The model is taught to ignore what
    all tiles have in common, without any search for the trigger: the control of `neural-cleanse` by patch.

    Args:
        form: What is drawn. "mask": a mask, whose share of the pixels and opacity are drawn, and a pattern, whose
            colour and noise are drawn. "additive": a difference of random strength. "warp": a displacement of
            each pixel by up to one pixel along each axis, of random strength. "mixed": one third of the stamped images
            each.
        applicator: "patch", or "image" for one stamp on the whole image.
        patch_size: By patch, the side of the tile in pixels, a divisor of the image's height and width. None: that of
            the model's patches, or 4 for a model without patches.
        epochs: Epochs of tuning, from 1.
        share: Share of each batch that is stamped, in (0, 1].
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the tiles do not cover the model's images.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        form: Literal["mask", "additive", "warp", "mixed"] = "mask",
        applicator: ApplicatorName = "patch",
        patch_size: int | None = None,
        epochs: int = 10,
        share: float = 0.5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_share(share)
        self.form, self.applicator, self.patch_size = form, applicator, patch_size
        self.epochs, self.share, self.lr = epochs, share, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the tiles do not cover the model's images."""
        canvas_side(self.applicator, self.patch_size, model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Tune."""
        names: tuple[FormName, ...] = tuple(FORMS) if self.form == "mixed" else (self.form,)
        side = canvas_side(self.applicator, self.patch_size, task.model)
        stamp = partial(stamp_at_random, [FORMS[name] for name in names], side)
        objective = stamped_objective(stamp, self.share)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, objective=objective)
        return DefenseResult("tuned", task.model)


def stamp_at_random(forms: list[Form], side: int | None, images: Tensor) -> Tensor:
    """Stamp images (B, 3, H, W) with one random stamp of each form, on equally many images each."""
    canvas = canvas_shape(images, side)
    parts = images.tensor_split(len(forms))
    stamped = [
        stamp_all(form, part, form.draw(*canvas, images.device), side)[0] if len(part) else part
        for form, part in zip(forms, parts, strict=True)
    ]
    return torch.cat(stamped)
