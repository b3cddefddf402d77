"""Neural Cleanse: invert a trigger for each class, find the class whose trigger is too small, and unlearn it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.inversion import Found, Search, invert
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.stamped_tuning import check_share, stamped_objective
from backdoorbench_moe.defenses.stamps import (
    ApplicatorName,
    blend_pattern,
    canvas_side,
    check_patch_size,
    stamp_all,
)
from backdoorbench_moe.ops.outliers import anomaly_indices
from backdoorbench_moe.ops.ranges import check_integer, check_interval, check_positive

Unlearn = Literal["flagged", "smallest", "all", "none"]


class NeuralCleanse(Defense):
    """Invert a trigger for each class, flag classes whose trigger is an outlier, and teach the model to ignore it.

    For each class, the smallest stamp is searched for with which the model takes clean images of other classes for this
    class. A class is flagged if its stamp is smaller than those of the other classes by more than `threshold` robust
    standard deviations (the anomaly index). Then the model is tuned on the defender's images, of which a part has an
    inverted stamp and the true label.

    By patch, one small stamp for all tiles is searched for, which is the form of the triggers of BadPatches.

    The judgement about classes has the anomaly index of each class as its score, positive for stamps smaller than the
    median. Its details have the size of each stamp ("sizes", the sum of its mask in pixels of the canvas), the share of
    images that it brings into the class ("success"), the epochs of the search, the classes for which no stamp succeeded
    ("failed"; they count as if their stamp covered the canvas) and the classes whose stamp was unlearned. The stamps
    themselves are in `scores.npz`: `0/masks` (classes, 1, h, w) and `0/patterns` (classes, 3, h, w).

    The smallest stamp can be weaker than the attacker's trigger. A model that has learned to ignore it may then still
    react to the trigger, such as to a picture that is blended into all tiles. By patch, the other classes have small
    stamps, too, so that the attacker's class need not be an outlier; hence the default of `unlearn`.

    The time is that of `epochs` times the number of classes passes over the images, forward and backward. Classes share
    passes through the model, which keeps a GPU busy but does not reduce the number of images.

    Departures: the paper unlearns with 10% of the training images, 20% of them stamped, in one epoch, and unlearns
    flagged classes only.

    Args:
        applicator: Where a stamp is searched for. "image": on the whole image, as in the paper. "patch": one tile that
            is stamped on all tiles of the image.
        patch_size: By patch, the side of the tile in pixels, a divisor of the image's height and width. None: that of
            the model's patches, or 4 for a model without patches.
        epochs: Most passes over the images in the search for one stamp, from 1.
        batch_size: Number of images that one step of the search stamps for each class, from 1.
        success: Share of the images of other classes that a stamp must bring into the class, in (0, 1).
        patience: Number of epochs after which the weight of the size is changed, from 1.
        classes_at_once: Number of classes that share a pass through the model, from 1. None: as many as stamp 640
            images of 32x32 at a time, or as many pixels of larger images.
        threshold: Anomaly index above which a class is flagged, above 0.
        unlearn: Whose stamps the model is taught to ignore. "flagged": those of flagged classes; if there are none, the
            model is not changed. "smallest": those of flagged classes; if there are none, the smallest one. "all":
            those of all classes. "none": the model is not changed.
        unlearn_epochs: Epochs of tuning, from 1.
        share: Share of each batch that is stamped in the tuning, in (0, 1].
        lr: Peak learning rate of the tuning, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the tiles do not cover the images.

    Source:
        Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
        and its code.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 2, "unlearn_epochs": 1}

    def __init__(
        self,
        *,
        applicator: ApplicatorName = "image",
        patch_size: int | None = None,
        epochs: int = 80,
        batch_size: int = 32,
        success: float = 0.98,
        patience: int = 5,
        classes_at_once: int | None = None,
        threshold: float = 2.0,
        unlearn: Unlearn = "all",
        unlearn_epochs: int = 20,
        share: float = 0.5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        whole = {
            "epochs": epochs,
            "batch_size": batch_size,
            "patience": patience,
            "classes_at_once": classes_at_once,
            "unlearn_epochs": unlearn_epochs,
        }
        for name, number in whole.items():
            check_integer(name, number, 1)
        check_interval("success", success, "(0, 1)")
        check_positive(threshold=threshold, lr=lr)
        check_share(share)
        check_patch_size(applicator, patch_size)
        self.applicator, self.patch_size = applicator, patch_size
        self.epochs, self.batch_size, self.success, self.patience = epochs, batch_size, success, patience
        self.classes_at_once, self.threshold = classes_at_once, threshold
        self.unlearn, self.unlearn_epochs, self.share, self.lr = unlearn, unlearn_epochs, share, lr

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if the tiles do not cover the images."""
        canvas_side(self.applicator, self.patch_size, model, image_size)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Search for the stamp of each class, measure its success on the images of other classes, and unlearn.

        This is an upper bound: searches can end earlier, and without flagged classes there may be nothing to unlearn.
        """
        unlearned = 0 if self.unlearn == "none" else self.unlearn_epochs
        return Cost(trained=(classes * self.epochs + unlearned) * held, predicted=(classes - 1) * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Invert, judge and unlearn."""
        side = canvas_side(self.applicator, self.patch_size, task.model, task.image_size)
        found = invert(task.model, task.clean, range(task.num_classes), self._search(task, side))
        indices = anomaly_indices(found.sizes)
        flagged = [label for label, index in enumerate(indices) if index > self.threshold]
        chosen = choose(self.unlearn, flagged, found)
        judgement = Judgement(
            "class",
            f"the smallest stamp {WHERE[self.applicator]} that turns other images into the class is this many robust "
            "standard deviations smaller than the median of all classes",
            scores={str(label): float(index) for label, index in enumerate(indices)},
            threshold=self.threshold,
            suspicious=[str(label) for label in flagged],
            details={
                "sizes": found.sizes,
                "success": found.success,
                "epochs": found.epochs,
                "failed": [label for label, failed in enumerate(found.failed) if failed],
                "unlearned": chosen,
            },
            arrays={"masks": found.values[:, :1], "patterns": found.values[:, 1:]},
        )
        if self.unlearn == "none":
            return DefenseResult("inverted", task.model, (judgement,))
        if chosen:
            stamp = partial(stamp_one, found.values[chosen], side)
            objective = stamped_objective(stamp, self.share, task.train.label_smoothing)
            task.tune(
                task.model,
                task.clean,
                epochs=self.unlearn_epochs,
                lr=self.lr,
                objective=objective,
                augment=True,
            )
        return DefenseResult("unlearned", task.model, (judgement,))

    def _search(self, task: DefenseTask, side: int | None) -> Search:
        return Search(
            side=side,
            epochs=self.epochs,
            batch_size=self.batch_size,
            success=self.success,
            patience=self.patience,
            at_once=self.classes_at_once,
            seed=task.seed,
            precision=task.precision,
        )


WHERE: Mapping[ApplicatorName, str] = {"image": "on the image", "patch": "in all tiles"}


def choose(unlearn: Unlearn, flagged: list[int], found: Found) -> list[int]:
    """Return the classes whose stamps are unlearned; see `NeuralCleanse`."""
    if unlearn == "none":
        return []
    if unlearn == "all":
        return list(range(len(found.sizes)))
    if unlearn == "smallest" and not flagged:
        return [min(range(len(found.sizes)), key=found.sizes.__getitem__)]
    return flagged


def stamp_one(values: Tensor, side: int | None, images: Tensor) -> Tensor:
    """Stamp images with one of K stamps, drawn from torch's global generator; values: (K, 4, h, w)."""
    row = torch.randint(len(values), (1,), device=images.device)
    return stamp_all(blend_pattern, images, values[row], side)[0]
