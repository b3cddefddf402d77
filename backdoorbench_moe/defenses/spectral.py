"""Spectral Signatures: remove the training images that are outliers along the main direction of their class."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.sample_filter import On, SampleFilter, Suspicion, members
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.components import principal_components
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.shares import share_of

# Ratio of the number of removed images to the assumed number of poisoned images.
MARGIN = Fraction(3, 2)


class Spectral(SampleFilter):
    """Remove the images whose vectors are outliers along the first principal component of their class.

    The score of an image is ((x - m) . v)^2, where x is its vector, m the mean of the vectors of its class and v their
    first principal component. In every class of n images, the floor(1.5 * epsilon * n) with the highest scores are
    removed. The defender does not know the target class, so clean classes lose the same share, and so does a clean
    training set. Finally, a model is retrained, see `SampleFilter`.

    Args:
        epsilon: Largest share of poisoned images in a class that the defender expects, in (0, 2/3). It refers to a
            class, not to the training set: if 1% of all images are relabelled to one of ten classes, about 10% of that
            class are poisoned.
        on: The vectors: "features", the input of the head, as in the paper; "routing" or "routing-map", see
            `SampleFilter`.
        retrain: Whether to train a new model without the removed images.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.

    Raises:
        ConfigError: A value is out of range, the model has no routing, or 1.5 * epsilon of all images is less than one
            image. If it is less than one image in every class, nothing is removed.

    Source:
        Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, algorithm 1. Routing vectors are
        ours.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epsilon": 0.1, "epochs": 1}

    def __init__(
        self, *, epsilon: float = 0.05, on: On = "features", retrain: bool = True, epochs: int | None = None
    ) -> None:
        super().__init__(on=on, retrain=retrain, epochs=epochs)
        if not 0 < epsilon * MARGIN < 1:
            raise ConfigError.expected("epsilon", "a number in (0, 2/3)", epsilon)
        self.epsilon = epsilon

    def count(self, images: int, num_classes: int) -> int:
        """Return 0: the defender holds no clean images. Raise ConfigError if no image would be removed."""
        if not self._removed(images):
            raise ConfigError(
                f"epsilon: {float(MARGIN)} * {self.epsilon} of {images} images is less than one image, even if all of "
                "them are of one class"
            )
        return super().count(images, num_classes)

    def judge(self, task: DefenseTask, vectors: Tensor, split: Split) -> Suspicion:
        """Score the images of each class, and mark those with the highest scores."""
        scores = vectors.new_zeros(len(vectors), dtype=torch.float64)
        suspicious = torch.zeros_like(scores, dtype=torch.bool)
        for places in members(split.labels, task.num_classes).values():
            scores[places] = found = outlier_scores(vectors[places])
            highest = found.argsort(descending=True, stable=True)
            suspicious[places[highest[: self._removed(len(places))]]] = True
        reason = (
            f"along the first principal component of its class's {self.on}, its distance from the mean is among the "
            f"largest {float(MARGIN) * self.epsilon:.3g}"
        )
        return Suspicion(scores, suspicious, reason)

    def _removed(self, images: int) -> int:
        """Return floor(1.5 * epsilon * images), without floating-point error."""
        return share_of(self.epsilon, MARGIN.numerator * images) // MARGIN.denominator


def outlier_scores(vectors: Tensor) -> Tensor:
    """Return the squared coordinates of the vectors of one class along their first principal component.

    Args:
        vectors: (n, D).

    Returns:
        (n,) float64; zeros if all vectors are equal.
    """
    coordinates, _ = principal_components(vectors, 1)
    return coordinates.square().sum(1)
