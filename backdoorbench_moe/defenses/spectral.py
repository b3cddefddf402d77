"""Spectral Signatures: throw out the training images that stand out most along the first direction of their class."""

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

# How many times the assumed number of poisoned images is thrown out.
MARGIN = Fraction(3, 2)


class Spectral(SampleFilter):
    """Throw out the images whose vectors stand out most along the direction in which those of their class vary most.

    The score of an image is ((x - m) . v)^2, where x is its vector, m the mean of the vectors of its class and v their
    first principal component. Of every class of n images, the floor(1.5 * epsilon * n) with the highest scores are
    thrown out. The defender does not know which class is the attacker's, so clean classes lose as large a share; and
    this happens to a clean training set, too. After that a model is trained again, see `SampleFilter`.

    Args:
        epsilon: Largest share of poisoned images in a class that the defender expects, in (0, 2/3). It is of a class,
            not of the training set: if 1% of all images are relabelled to one of ten classes, about 10% of that class
            are poisoned.
        on: The vectors: "features" before the head, as in the paper, or "routing" or "routing-map", see `SampleFilter`.
        retrain: Whether to train a new model without the images that are thrown out.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.

    Raises:
        ConfigError: A value is out of range, the model has no routing, or so small a share is less than one of all
            images. If it is less than one image of every class, nothing is thrown out.

    Source:
        Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, algorithm 1; routing vectors are
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
        """Return 0: the defender holds no clean images. Raises ConfigError if not one image would be thrown out."""
        if not self._removed(images):
            raise ConfigError(
                f"epsilon: {float(MARGIN)} * {self.epsilon} of {images} images is less than one image, even if all of "
                "them are of one class"
            )
        return super().count(images, num_classes)

    def judge(self, task: DefenseTask, vectors: Tensor, split: Split) -> Suspicion:
        """Score the images of each class, and mark the highest of each."""
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
        """Return the floor of 1.5 * epsilon * images, without the rounding of floats."""
        return share_of(self.epsilon, MARGIN.numerator * images) // MARGIN.denominator


def outlier_scores(vectors: Tensor) -> Tensor:
    """Square the coordinates of the vectors of one class along their first principal component.

    Args:
        vectors: (n, D).

    Returns:
        (n,) float64; zeros if all vectors are equal.
    """
    coordinates, _ = principal_components(vectors, 1)
    return coordinates.square().sum(1)
