"""SCALE-UP: reject an image whose prediction stays the same when its pixels are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.filters import InputFilter, Score
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer


class ScaleUp(InputFilter):
    """SCALE-UP: reject an image whose prediction stays the same when its pixel values are multiplied.

    The score is the share of the `factors` n for which the image n x, clipped at white, has the same prediction as x. A
    triggered image keeps its prediction; a clean one loses it as it turns white. The score is uninformative for bright
    images, which hardly change, and for triggers that also turn white.

    With k factors, the score has only k + 1 values. If more than a share of `fpr` of the clean images have the highest
    one, 1, no image is above the threshold, and nothing is rejected: TPR and FPR are then 0, while AUROC still shows
    whether the scores differ. The scores of `statistic="probability"` are continuous.

    Departures: by default, the threshold is a quantile of the scores of clean images (`fpr`), and scores are not
    normalised although the defender has clean images. The statistic "probability" is ours.

    Args:
        factors: The factors n, integers from 2.
        statistic: "agreement": as above. "probability": the probability of the class that is predicted for the original
            image, averaged over the scaled images.
        normalise: Whether to standardise the score with the mean and the standard deviation of the scores of clean
            images with the same prediction, as the paper does if the defender has clean images. For classes with fewer
            than two images, those of all images are used.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        threshold: A fixed threshold that replaces `fpr`; None for none. It is 0.5 in BackdoorBox.
        calibrate: Largest number of the defender's images that are used to set the threshold.
        reserve: Number of the defender's images that `normalise` uses, from 2; they do not set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the images are too few for `fpr`.

    Source:
        Guo et al., "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction
        Consistency", ICLR 2023, section 4.
    """

    tiny: ClassVar[Mapping[str, object]] = {"statistic": "probability", "fpr": 0.25, "reserve": 8}
    reason = "the prediction stays the same when all pixel values are multiplied"
    purpose = "give the mean scores of the classes"

    def __init__(
        self,
        *,
        factors: tuple[int, ...] = (3, 5, 7, 9, 11),
        statistic: Literal["agreement", "probability"] = "agreement",
        normalise: bool = False,
        fpr: float = 0.05,
        threshold: float | None = None,
        calibrate: int = 1000,
        reserve: int = 100,
        clean_fraction: float = 0.05,
    ) -> None:
        check_integer("reserve", reserve, 2)
        super().__init__(
            reserved=reserve if normalise else 0,
            fpr=fpr,
            threshold=threshold,
            calibrate=calibrate,
            clean_fraction=clean_fraction,
        )
        if not factors or min(factors) < 2:
            raise ConfigError.expected("factors", "integers of at least 2", factors)
        self.factors, self.statistic, self.normalise, self.reserve = factors, statistic, normalise, reserve

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Pass each image, and its product with each factor."""
        passes = 1 + len(self.factors)
        return Cost(predicted=passes * (self.reserved + self.calibrated(held)), judged=passes)

    def prepare(self, task: DefenseTask, reserved: Split) -> tuple[Score, dict[str, object]]:
        """Return the score, which is normalised with the reserved images if `normalise` is set."""

        def measure(images: Tensor) -> tuple[Tensor, Tensor]:
            called = task.logits(task.model, images).argmax(1)
            found = [self._consistency(task, images, factor, called) for factor in self.factors]
            return torch.stack(found).mean(0), called

        if not self.normalise:
            return lambda images: measure(images)[0], {}
        means, deviations = class_moments(*measure(reserved.images), task.num_classes)

        def normalised(images: Tensor) -> Tensor:
            values, called = measure(images)
            return (values - means[called]) / deviations[called]

        return normalised, {}

    def _consistency(self, task: DefenseTask, images: Tensor, factor: int, called: Tensor) -> Tensor:
        """Return the statistic for images that are multiplied by a factor, (B,) float64."""
        logits = task.logits(task.model, multiply(images, factor)).double()
        if self.statistic == "agreement":
            return (logits.argmax(1) == called).double()
        return logits.softmax(1).gather(1, called.unsqueeze(1)).squeeze(1)


def multiply(images: Tensor, factor: int) -> Tensor:
    """Multiply (B, C, H, W) uint8 images by a factor, and clip them at 255."""
    # Factors of 255 and above all give 0 or 255; large ones would overflow.
    return (images.int() * min(factor, 255)).clamp(max=255).to(torch.uint8)


def class_moments(scores: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of the scores of each class.

    Args:
        scores: (N,) float64.
        classes: (N,) int64.
        num_classes: Number of classes.

    Returns:
        (classes,) float64 each. Classes with fewer than two scores get the values of all scores. A deviation below 0.01
        counts as 0.01, so that a class of equal scores does not make every other score an outlier.
    """
    groups = [scores[classes == number] for number in range(num_classes)]
    groups = [group if len(group) > 1 else scores for group in groups]
    means = torch.stack([group.mean() for group in groups])
    return means, torch.stack([group.std() for group in groups]).clamp(min=0.01)
