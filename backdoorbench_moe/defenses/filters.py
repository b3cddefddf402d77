"""The base class of input filters with a threshold that is calibrated on clean images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.detection import calibrate_threshold, threshold_rank
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.ops.seeding import generator

Score = Callable[[Tensor], Tensor]


class InputFilter(Defense):
    """Base class of input filters that score an image and reject it if its score is above a threshold.

    The threshold is a quantile of the scores of the defender's clean images, or a fixed number. Images that are used to
    fit the score are reserved and do not set the threshold, since their scores differ from those of new images. The
    model is not changed.

    Subclasses implement `prepare`, and set `reason`, the first half of the judgement's reason, and `purpose`, what the
    reserved images are used for. `draw` names the random stream from which the reserved images are drawn. The detail
    "calibrated_on" of the judgement is the number of images that were used to set the threshold; 0 if it is fixed.

    Args:
        reserved: Number of the defender's images that are not used to set the threshold.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        threshold: A fixed threshold that replaces `fpr`; None for none.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]. The model was trained on them.

    Raises:
        ConfigError: A value is out of range, or the images are too few for `fpr`.
    """

    reason: ClassVar[str]
    purpose: ClassVar[str]
    draw: ClassVar[str] = "filter"

    def __init__(
        self, *, reserved: int, fpr: float, threshold: float | None, calibrate: int, clean_fraction: float
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_interval("fpr", fpr, "(0, 1)")
        if threshold is not None and not isfinite(threshold):
            raise ConfigError.expected("threshold", "a finite number", threshold)
        if not threshold_rank(fpr, calibrate):
            raise ConfigError.expected(
                "calibrate", f"enough images to set a threshold for fpr={fpr}", calibrate
            )
        self.reserved, self.fpr, self.threshold, self.calibrate = reserved, fpr, threshold, calibrate

    def count(self, images: int, num_classes: int) -> int:
        """Return the number of training images that the defender holds.

        Args:
            images: Number of training images.
            num_classes: Number of classes.

        Raises:
            ConfigError: The defender would hold fewer images than are reserved, or too few others to set a threshold
                for `fpr`.
        """
        count = super().count(images, num_classes)
        self._check_held(count, f"clean_fraction: {self.clean_fraction} of {images} images is {count}")
        return count

    def _check_held(self, count: int, held: str) -> None:
        """Check that the defender holds enough images.

        Args:
            count: Number of images that the defender holds.
            held: The beginning of the message, which states this number.

        Raises:
            ConfigError: They are fewer than are reserved, or the others are too few to set a threshold for `fpr`.
        """
        left = count - self.reserved
        if self.threshold is not None and left < 0:
            raise ConfigError(f"{held}; expected at least {self.reserved}, which {self.purpose}")
        if self.threshold is None and not threshold_rank(self.fpr, left):
            others = f"; {self.reserved} {self.purpose}, and the {max(left, 0)} left"
            raise ConfigError(
                f"{held}{others if self.reserved else ', which'} are too few to set a threshold for fpr={self.fpr}"
            )

    def calibrated(self, held: int) -> int:
        """Return how many of the images that the defender holds are used to set the threshold; 0 if it is fixed."""
        return 0 if self.threshold is not None else min(self.calibrate, held - self.reserved)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Prepare the score with the reserved images, and set the threshold with others."""
        clean = task.clean
        # For a mixture, they are equally many of each task, which may be fewer than `count` returned.
        self._check_held(
            len(clean), f"clean_fraction: with {self.clean_fraction}, the number of images is {len(clean)}"
        )
        order = torch.randperm(len(clean), generator=generator(task.seed, self.draw)).to(clean.labels.device)
        kept, others = order[: self.reserved], order[self.reserved : self.reserved + self.calibrate]
        score, details = self.prepare(task, Split(clean.images[kept].clone(), clean.labels[kept].clone()))
        threshold, count = self.threshold, 0
        if threshold is None:
            values, count = score(clean.images[others]).double().cpu().numpy(), len(others)
            threshold = calibrate_threshold(values, self.fpr)
            rule = f"a clean image is above the threshold with a chance of at most {self.fpr:g}"
        else:
            rule = "the threshold is fixed"
        judgement = Judgement(
            "input",
            f"{self.reason}; {rule}",
            threshold=threshold,
            details={"calibrated_on": count, **details},
            judge=score,
        )
        return DefenseResult("filtered", task.model, (judgement,))

    @abstractmethod
    def prepare(self, task: DefenseTask, reserved: Split) -> tuple[Score, dict[str, object]]:
        """Return the function that scores images, and further details for the record.

        Args:
            task: The task; its model must not be changed.
            reserved: The images that are not used to set the threshold, and their labels.

        Returns:
            A function of images (B, 3, H, W) uint8 that returns (B,) finite floats, and the details by name. Higher
            scores are more suspicious, and the score of an image must not depend on the other images.
        """
