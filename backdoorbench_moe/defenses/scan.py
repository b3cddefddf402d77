"""SCAn: find the classes that are a mixture of two groups, and remove the group that is unlike clean images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.sample_filter import On, SampleFilter, Suspicion, members
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.clustering import between_squares, two_means
from backdoorbench_moe.ops.components import principal_components
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.outliers import anomaly_indices
from backdoorbench_moe.ops.ranges import check_integer, check_positive

# Added to the covariance within classes, as a share of its mean variance, so that it can be inverted.
RIDGE = 1e-6
# Two values are always equally far from their median.
FEWEST_CLASSES = 3


class Scan(SampleFilter):
    """SCAn: remove one of two groups in classes that are better described by two means than by one.

    The vectors of a class are modelled as normally distributed, with one mean for each class and a covariance that all
    classes share, which is estimated on the defender's clean images. For each class, a likelihood ratio compares one
    mean with two means, for the two groups that maximise it. A class is suspicious if its ratio is an outlier among all
    classes (see `ops.outliers.anomaly_indices`). In a suspicious class, the group whose mean is farther from that of
    the clean images of the class is removed; the smaller group if there are no such images. The score of an image is
    the log-likelihood ratio between that group and the other one. Finally, a model is retrained, see `SampleFilter`.

    Departures: the vectors are first reduced to their principal components: at most `components`, and at most
    (n - C) / 2 for n clean images of C classes. The covariance is the pooled covariance within classes, to which the
    paper's iterative estimate converges with many images in each class. The groups are those of
    2-means in the metric of the covariance, which is expectation maximisation with hard assignments and equal priors.
    The log-likelihood ratio is divided by the number of images of the class, and corrected for small classes (see
    `TwoGroups.evidence`). Otherwise, classes would be suspicious because of their size.

    Args:
        components: Largest number of principal components, from 1.
        threshold: Anomaly index above which a class is suspicious, above 0. The default is e^2, as in the paper.
        on: The vectors: "features", the input of the head, as in the paper; "routing" or "routing-map", see
            `SampleFilter`.
        retrain: Whether to train a new model without the removed images.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.
        clean_fraction: Share of the training images that the defender knows to be clean, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the model has no routing, or there are fewer than 3 classes or too few
            clean images.

    Source:
        Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
        USENIX Security 2021, section 5. Routing vectors are ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training-set", "features", "clean"})
    tiny: ClassVar[Mapping[str, object]] = {"components": 4, "threshold": 0.5, "epochs": 1}

    def __init__(
        self,
        *,
        components: int = 64,
        threshold: float = math.e**2,
        on: On = "features",
        retrain: bool = True,
        epochs: int | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(on=on, retrain=retrain, epochs=epochs, clean_fraction=clean_fraction)
        check_integer("components", components, 1)
        check_positive(threshold=threshold)
        self.components, self.threshold = components, threshold

    def count(self, images: int, num_classes: int) -> int:
        """Return the number of training images that the defender holds.

        Args:
            images: Number of training images.
            num_classes: Number of classes.

        Raises:
            ConfigError: There are too few classes to compare, or too few clean images to estimate a covariance.
        """
        count = super().count(images, num_classes)
        if num_classes < FEWEST_CLASSES:
            raise ConfigError(
                f"scan: a class is suspicious in comparison with the others; expected at least {FEWEST_CLASSES} "
                f"classes, got {num_classes}"
            )
        if count < num_classes + 2:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; expected at least "
                f"{num_classes + 2}, two more than there are classes, to estimate a covariance within classes"
            )
        return count

    def judge(self, task: DefenseTask, vectors: Tensor, split: Split) -> Suspicion:
        """Compare one mean with two for each class, and mark one group of suspicious classes."""
        clean = task.clean
        most = (len(clean) - len(clean.labels.unique())) // 2
        points, known = self._whitened(
            vectors, self.represent(task, clean.images), clean.labels, max(1, most)
        )
        scores = points.new_zeros(len(points))
        groups = {}
        for label, places in members(split.labels, task.num_classes).items():
            groups[label] = found = split_class(points[places], known[clean.labels == label])
            scores[places] = found.scores
        suspicious = torch.zeros_like(scores, dtype=torch.bool)
        anomalies = dict(zip(groups, anomaly_of(groups), strict=True))
        chosen = [label for label, index in anomalies.items() if index > self.threshold]
        for label in chosen:
            suspicious |= (split.labels == label) & (scores > 0)
        about_classes = Judgement(
            "class",
            f"two means describe its {self.on} better than one, by more than in other classes; the score is the "
            "anomaly index of the likelihood ratio",
            scores={str(label): index for label, index in anomalies.items()},
            threshold=self.threshold,
            suspicious=list(map(str, chosen)),
            details={"log_ratio": {str(label): found.ratio for label, found in groups.items()}},
        )
        reason = (
            f"its class is a mixture of two groups by its {self.on}, and it is likelier in the one that is unlike "
            "clean images"
        )
        return Suspicion(scores, suspicious, reason, others=(about_classes,))

    def _whitened(self, vectors: Tensor, clean: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Reduce training and clean vectors, and scale them so that the covariance within classes is the identity."""
        points, directions = principal_components(vectors, min(self.components, most))
        known = (clean.double() - vectors.double().mean(0)) @ directions.T
        if not points.shape[1]:
            return points, known
        factor = torch.linalg.cholesky(
            within_covariance(known, labels, smallest=RIDGE * points.var(0).mean())
        )
        return (
            torch.linalg.solve_triangular(factor, points.T, upper=False).T,
            torch.linalg.solve_triangular(factor, known.T, upper=False).T,
        )


@dataclass(frozen=True)
class TwoGroups:
    """A class split into two groups.

    Attributes:
        ratio: Log-likelihood ratio of two means to one, divided by the number of images n.
        evidence: The ratio divided by the largest variance, over all directions, of n standard normal points in k
            dimensions: about (1 + sqrt(k / n))^2. A normally distributed class is best split across this direction, and
            its ratio is proportional to that variance; the division makes small and large classes comparable.
        scores: (n,) log-likelihood ratio of each image between the suspicious group and the other one; positive for
            members of the suspicious group.
    """

    ratio: float
    evidence: float
    scores: Tensor


def anomaly_of(groups: Mapping[int, TwoGroups]) -> list[float]:
    """Return how many robust standard deviations the evidence of each class lies above the median of all classes."""
    evidence = [found.evidence for found in groups.values()]
    return [-float(index) for index in anomaly_indices(evidence)] if evidence else []


def within_covariance(points: Tensor, labels: Tensor, *, smallest: Tensor) -> Tensor:
    """Compute the covariance (k, k) of points around the means of their classes, with a small ridge.

    Args:
        points: (n, k) float64.
        labels: (n,) int64, of C different classes. The sum of squares is divided by n - C.
        smallest: Scalar, the least variance that the ridge is a share of. It matters if the points of each class are
            (nearly) equal.
    """
    present, index = labels.unique(return_inverse=True)
    inside = torch.nn.functional.one_hot(index, len(present)).to(points.dtype)
    means = inside.T @ points / inside.sum(0).unsqueeze(1)
    apart = points - means[index]
    covariance = apart.T @ apart / max(1, len(points) - len(present))
    scale = covariance.diagonal().mean().clamp(min=smallest)
    return covariance + RIDGE * scale * torch.eye(points.shape[1], dtype=points.dtype, device=points.device)


def split_class(points: Tensor, clean: Tensor) -> TwoGroups:
    """Split the points of one class into two groups with identity covariance, and find the suspicious one.

    Args:
        points: (n, k) float64.
        clean: (m, k) float64, points of clean images of the class; m may be 0.

    Source:
        For the largest variance: Bai and Yin, "Limit of the smallest eigenvalue of a large dimensional sample
        covariance matrix", Annals of Probability 1993, theorem 2.
    """
    principal, directions = principal_components(points, points.shape[1])
    group = two_means(principal)
    if not group.any():
        return TwoGroups(0.0, 0.0, points.new_zeros(len(points)))
    ratio = between_squares(principal, group.unsqueeze(0)).item() / (2 * len(points))
    means = torch.stack([principal[~group].mean(0), principal[group].mean(0)])
    suspect = 1
    if len(clean):
        centre = (clean.mean(0) - points.mean(0)) @ directions.T
        suspect = int((means - centre).square().sum(1).argmax())
    other, own = means[1 - suspect], means[suspect]
    scores = ((principal - other).square().sum(1) - (principal - own).square().sum(1)) / 2
    evidence = ratio / (1 + math.sqrt(points.shape[1] / len(points))) ** 2
    return TwoGroups(ratio, evidence, scores)
