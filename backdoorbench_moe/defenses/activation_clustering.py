"""Activation Clustering: split the training images of each class into two clusters, and remove suspicious ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.sample_filter import On, SampleFilter, Suspicion, members
from backdoorbench_moe.ops.clustering import silhouettes, two_means
from backdoorbench_moe.ops.components import principal_components
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer, check_interval

Rule = Literal["size", "silhouette", "both"]


class ActivationClustering(SampleFilter):
    """Split the vectors of each class into two clusters, and remove the smaller one if the class is suspicious.

    The vectors of a class are reduced to their first components and clustered by 2-means. The mean silhouette measures
    how well the two clusters are separated. Finally, a model is retrained, see `SampleFilter`.

    The paper does not score single images. Here, the score of an image is its position on the line through the means of
    the two clusters, from -1 at the mean of the larger one to 1 at that of the smaller one, times the mean silhouette
    of its class.

    Departures: two defaults differ from the paper, which uses independent components (`reduce="ica"`) and considers a
    class suspicious if either its size or its silhouette is. Here, both must be (`rule="both"`), so fewer clean classes
    are suspicious. 2-means starts from splits along the components instead of random points, see
    `ops.clustering.two_means`. The paper proposes to train a model without a suspicious cluster and to check how it
    classifies the images of that cluster ("exclusionary reclassification"); here, size and silhouette decide.

    Args:
        components: Number of components, from 1.
        reduce: "ica": independent components, as in the paper. They are the principal components, scaled to variance 1
            and rotated. The rotation is omitted, since clusters and silhouettes do not depend on it. "pca": the
            unscaled principal components, so directions with a large variance have more weight.
        rule: When a class is suspicious. "size": the share of the smaller cluster is below `size`. "silhouette": the
            mean silhouette is above `silhouette`. "both": both.
        size: Threshold for the share of the smaller cluster, in (0, 1/2].
        silhouette: Threshold for the mean silhouette, in (0, 1).
        on: The vectors: "features", the input of the head, as in the paper; "routing" or "routing-map", see
            `SampleFilter`.
        retrain: Whether to train a new model without the removed images.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.

    Raises:
        ConfigError: A value is out of range, or the model has no routing.

    Source:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018
        (arXiv 1811.03728). Routing vectors are ours.
    """

    tiny: ClassVar[Mapping[str, object]] = {
        "components": 3,
        "rule": "silhouette",
        "silhouette": 0.01,
        "epochs": 1,
    }

    def __init__(
        self,
        *,
        components: int = 10,
        reduce: Literal["ica", "pca"] = "pca",
        rule: Rule = "both",
        size: float = 0.35,
        silhouette: float = 0.1,
        on: On = "features",
        retrain: bool = True,
        epochs: int | None = None,
    ) -> None:
        super().__init__(on=on, retrain=retrain, epochs=epochs)
        check_integer("components", components, 1)
        check_interval("size", size, "(0, 0.5]")
        check_interval("silhouette", silhouette, "(0, 1)")
        self.components, self.reduce, self.rule = components, reduce, rule
        self.size, self.silhouette = size, silhouette

    def judge(self, task: DefenseTask, vectors: Tensor, split: Split) -> Suspicion:
        """Cluster each class, and mark the smaller cluster of suspicious classes."""
        scores = vectors.new_zeros(len(vectors), dtype=torch.float64)
        suspicious = torch.zeros_like(scores, dtype=torch.bool)
        separations, shares, chosen = {}, {}, []
        for label, places in members(split.labels, task.num_classes).items():
            smaller, line, separation = divide(vectors[places], self.components, whiten=self.reduce == "ica")
            scores[places], share = separation * line, smaller.double().mean().item()
            separations[str(label)], shares[str(label)] = separation, share
            if self._suspects(separation, share):
                suspicious[places[smaller]] = True
                chosen.append(str(label))
        about_classes = Judgement(
            "class",
            f"its {self.on} fall into two clusters; the score is their mean silhouette",
            scores=separations,
            suspicious=chosen,
            details={"smaller_share": shares},
        )
        reason = f"it is in the smaller of two clusters of its class's {self.on}, and the class is suspicious"
        return Suspicion(scores, suspicious, reason, others=(about_classes,))

    def _suspects(self, separation: float, share: float) -> bool:
        small, apart = 0 < share < self.size, separation > self.silhouette
        return {"size": small, "silhouette": apart, "both": small and apart}[self.rule]


def divide(vectors: Tensor, components: int, *, whiten: bool) -> tuple[Tensor, Tensor, float]:
    """Split the vectors of one class into two clusters.

    Args:
        vectors: (n, D).
        components: Number of principal components to keep.
        whiten: Whether to scale them to variance 1.

    Returns:
        (n,) bool, the smaller cluster; (n,) float64 in [-1, 1], the positions on the line through the means, 1 at and
        beyond the mean of the smaller cluster; and the mean silhouette. If all vectors are equal, the last two are 0.
    """
    points, _ = principal_components(vectors, components)
    if whiten:
        points = points / points.square().mean(0).sqrt()
    smaller = two_means(points)
    if not smaller.any():
        return smaller, points.new_zeros(len(points)), 0.0
    mean, other = points[smaller].mean(0), points[~smaller].mean(0)
    line = (2 * points - mean - other) @ (mean - other) / (mean - other).square().sum()
    return smaller, line.clamp(-1, 1), silhouettes(points, smaller).mean().item()
