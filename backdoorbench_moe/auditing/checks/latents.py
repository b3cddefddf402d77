"""Checks of the features of the given images by class, and of the latents of a mixture's tasks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from itertools import combinations
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.analysis.latents import mean_directions
from backdoorbench_moe.auditing.check import Check, Measured, Need, NotTested
from backdoorbench_moe.auditing.siblings import FEWEST
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.defenses.activation_clustering import divide
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.routing_load import CONSTANT, image_loads, variation
from backdoorbench_moe.defenses.sample_filter import members
from backdoorbench_moe.engine.inference import features
from backdoorbench_moe.moe.layers import MoEModel
from backdoorbench_moe.moe.merging import NETWORK
from backdoorbench_moe.moe.structure import WithFeatures
from backdoorbench_moe.ops.components import principal_components
from backdoorbench_moe.ops.outliers import anomaly_indices

# Classes with fewer images are left out; with fewer classes, none can be an outlier.
FEWEST_OF_CLASS, FEWEST_CLASSES = 5, 4
COMPONENTS = 5
OUTLIER = "how many robust standard deviations a class lies above the median of all classes"


class ClassCheck(Check):
    """Base class of checks that compare the predicted classes.

    Subclasses implement `values` and set `finding`, which describes the class with the highest value.
    """

    needs: ClassVar[tuple[Need, ...]] = ("images", "features")
    explains: ClassVar[str] = OUTLIER
    finding: ClassVar[str]

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of passing each image once."""
        return Cost(predicted=len(subject.split))

    def measure(self, subject: Subject) -> Measured:
        """Compare the classes with at least `FEWEST_OF_CLASS` images."""
        groups = members(subject.predicted.cpu(), subject.num_classes)
        places = {label: rows for label, rows in groups.items() if len(rows) >= FEWEST_OF_CLASS}
        if len(places) < FEWEST_CLASSES:
            raise NotTested(
                f"only {len(places)} classes have {FEWEST_OF_CLASS} images; {FEWEST_CLASSES} are needed"
            )
        values = self.values(subject, places)
        indices = -anomaly_indices(list(values.values()))
        label = list(values)[int(indices.argmax())]
        middle = median(values.values())
        reason = (
            f"{subject.class_name(label)}: {self.finding} "
            f"({values[label]:.3g}; the median of all classes is {middle:.3g})"
        )
        details = {"class": label, "values": {str(c): value for c, value in values.items()}}
        return Measured(float(indices.max()), reason, details)

    @abstractmethod
    def values(self, subject: Subject, places: Mapping[int, Tensor]) -> dict[int, float]:
        """Return a value for each class, which is high for suspicious classes.

        Args:
            subject: The subject.
            places: The indices of the images of each class.
        """


class LatentClusters(ClassCheck):
    """Whether the features of one class form two clusters more clearly than those of the others."""

    name = "latent-clusters"
    title = "classes whose features fall into clusters"
    finding = "its features fall into two clusters more clearly than those of other classes"
    source = "the clusters are those of Chen et al., 2018 (Activation Clustering); the statistic is ours"

    def values(self, subject: Subject, places: Mapping[int, Tensor]) -> dict[int, float]:
        """Return the mean silhouette of each class."""
        vectors = feature_vectors(subject)
        return {label: divide(vectors[rows], COMPONENTS, whiten=False)[2] for label, rows in places.items()}


class LatentSpectrum(ClassCheck):
    """Whether the features of one class vary along one direction more than those of the others."""

    name = "latent-spectrum"
    title = "classes whose features lie on a line"
    finding = "a larger share of the variance of its features lies along one direction than of other classes"
    source = "the direction is that of Tran et al., NeurIPS 2018 (Spectral Signatures); the statistic is ours"

    def values(self, subject: Subject, places: Mapping[int, Tensor]) -> dict[int, float]:
        """Return the share of the first principal component in the variance of each class."""
        vectors = feature_vectors(subject)
        found = {}
        for label, rows in places.items():
            coordinates, _ = principal_components(vectors[rows], len(rows))
            squares = coordinates.square().sum(0)
            found[label] = (squares[0] / squares.sum()).item() if len(squares) else 0.0
        return found


class ClassRouting(ClassCheck):
    """Whether the load of the experts differs more for the images of one class than for those of the others."""

    name = "class-routing"
    title = "classes with experts of their own"
    needs = ("images", "routing")
    finding = "its images load the experts unlike those of other classes"

    def values(self, subject: Subject, places: Mapping[int, Tensor]) -> dict[int, float]:
        """Return the total variation distance between the mean loads of each class and of the other classes."""
        images = subject.split.images
        loads = image_loads(subject.task, images, "experts")
        if variation(loads) < CONSTANT:
            loads = image_loads(subject.task, images, "gates")
        means = {
            label: [load[rows.to(load.device)].mean(0) for load in loads] for label, rows in places.items()
        }
        found = {}
        for label, own in means.items():
            others = [torch.stack(layer).mean(0) for layer in zip(*_without(means, label), strict=True)]
            apart = [(one - other).abs().sum() / 2 for one, other in zip(own, others, strict=True)]
            found[label] = torch.stack(apart).mean().item()
        return found


def _without(means: Mapping[int, list[Tensor]], label: int) -> list[list[Tensor]]:
    return [loads for other, loads in means.items() if other != label]


def feature_vectors(subject: Subject) -> Tensor:
    """Return the features (N, D) of the images before the head, on the CPU."""
    assert isinstance(subject.model, WithFeatures)
    return features(subject.model, subject.split.images, precision=subject.precision).cpu()


class TaskLatents(Check):
    """Whether the gates' inputs for two tasks are more similar than those for other pairs of tasks.

    MoEvil aligns the gates' inputs for marked images with those for the expert's own task. An audit only has clean
    images of each task. The latents of a layer are the mean directions of the inputs of its gates.
    """

    name = "task-latents"
    title = "tasks that the gates cannot tell apart"
    needs = ("tasks",)
    explains = "how many robust standard deviations the latents of two tasks are more alike than those of other pairs"

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of passing the images of each task once."""
        return Cost(predicted=sum(map(len, subject.tasks)))

    def measure(self, subject: Subject) -> Measured:
        """Compare the cosines of the latents of all pairs of tasks."""
        if not isinstance(subject.model, MoEModel):
            raise NotTested(f"{type(subject.model).__name__} is no mixture whose gates' inputs can be read")
        if len(subject.tasks) < FEWEST:
            raise NotTested(f"{len(subject.tasks)} tasks have one pair; {FEWEST} tasks are needed")
        latents = [
            mean_directions(subject.model, task, precision=subject.precision) for task in subject.tasks
        ]
        most, best, cosines = -1.0, ("", 0, 1), {}
        for layer in latents[0]:
            directions = [torch.nn.functional.normalize(each[layer], dim=0) for each in latents]
            pairs = {
                (a, b): float(directions[a] @ directions[b]) for a, b in combinations(range(len(latents)), 2)
            }
            if not all(map(math.isfinite, pairs.values())):
                raise NotTested(
                    f"the inputs of the gates of {layer.removeprefix(NETWORK)} are not finite numbers"
                )
            cosines[layer.removeprefix(NETWORK)] = {f"{a}-{b}": value for (a, b), value in pairs.items()}
            indices = -anomaly_indices(list(pairs.values()))
            if indices.max() > most:
                most, best = (
                    float(indices.max()),
                    (layer.removeprefix(NETWORK), *list(pairs)[int(indices.argmax())]),
                )
        layer, first, second = best
        pair = " and ".join(map(subject.task_name, (first, second)))
        reason = (
            f"the gates of {layer} see tasks {pair} as more alike than other pairs of tasks "
            f"(cosine {cosines[layer][f'{first}-{second}']:.2f})"
        )
        return Measured(most, reason, {"layer": layer, "tasks": [first, second], "cosines": cosines})
