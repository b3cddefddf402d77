"""What defenses share that judge the images of the training set, throw some out, and train the model again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import check_routed
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.ops.images import Split, content_order
from backdoorbench_moe.ops.ranges import check_integer

On = Literal["features", "routing", "routing-map"]


@dataclass(frozen=True)
class Suspicion:
    """What a `SampleFilter` thinks of N training images.

    Args:
        scores: (N,) floats; higher is more suspicious.
        suspicious: (N,) bool, the images to throw out.
        reason: See `Judgement`.
        others: Judgements about other things, such as classes.
    """

    scores: Tensor
    suspicious: Tensor
    reason: str
    others: tuple[Judgement, ...] = ()


class SampleFilter(Defense):
    """Base class of defenses that represent each training image by a vector, and throw out images by these vectors.

    The vector of an image is what the model has before its head, or its routing. That consists of the gates (E, P) of
    all routed layers, one after the other. For "routing" the gates of each expert are sorted in descending order, so
    that they say how much the expert prefers some patches, but not where they are: a trigger changes this in the same
    way wherever it is. For "routing-map" they stay in the order of the patches. Means over the patches would say
    nothing in expert-choice routing, in which they are the same for all images.

    If images were thrown out, a model with new weights is trained on the others with the run's recipe. The images are
    first put into an order that depends on their contents only, so that neither the judgement nor the new model depends
    on the order of the training set.

    Subclasses implement `judge`.

    Args:
        on: The vectors: "features" before the head, "routing" or "routing-map", as above.
        retrain: Whether to train a new model without the images that are thrown out.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.
        clean_fraction: Share of the training images of which the defender knows that they are clean, in (0, 1]; used
            only by defenses that need "clean".

    Raises:
        ConfigError: A value is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training-set", "features"})
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        on: On = "features",
        retrain: bool = True,
        epochs: int | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        if on != "features":
            # A routed model need not have features.
            self.needs = self.needs - {"features"}  # type: ignore[misc]
        super().__init__(clean_fraction=clean_fraction)
        check_integer("epochs", epochs, at_least=1)
        self.on, self.retrain, self.epochs = on, retrain, epochs

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the vectors are to be of the routing, and the model has none."""
        if self.on != "features":
            check_routed(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Represent the training images and those that the defender holds, and train again.

        This is an upper bound: the images that are thrown out are not trained on, and if there are none, no model is.
        """
        epochs = (self.epochs or recipe.epochs) if self.retrain else 0
        return Cost(trained=epochs * train, predicted=train + held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge the training images, and train again without those that are suspicious."""
        order, split = in_order(task.training_set)
        found = self.judge(task, self.represent(task, split.images), split)
        judgements = (judge_samples(found, order), *found.others)
        if not self.retrain or not found.suspicious.any():
            return DefenseResult("judged", task.model, judgements)
        left = without(split, found.suspicious, found.scores, task.train.batch_size)
        model = task.fresh()
        task.tune(model, left, epochs=self.epochs or task.train.epochs)
        return DefenseResult("retrained", model, judgements)

    def represent(self, task: DefenseTask, images: Tensor) -> Tensor:
        """Return the vectors (N, D) float32 of images (N, 3, H, W) uint8."""
        if self.on == "features":
            return task.features(task.model, images)
        placed = self.on == "routing-map"
        batches = task.routing(task.model, images)
        return torch.cat(
            [torch.cat([gate_vectors(one, placed=placed) for one in layers], 1) for layers in batches]
        )

    @abstractmethod
    def judge(self, task: DefenseTask, vectors: Tensor, split: Split) -> Suspicion:
        """Judge the training images.

        Args:
            task: The task.
            vectors: (N, D) float32, their vectors.
            split: The images and their labels, which may be wrong.
        """


def gate_vectors(routing: Routing, *, placed: bool) -> Tensor:
    """Return the gates of one routed layer as vectors (B, E * P) float32.

    Args:
        routing: The routing of B images.
        placed: Whether the gates of each expert stay in the order of the patches; they are in descending order if not.
    """
    gates = routing.gates.float()
    return (gates if placed else gates.sort(2, descending=True).values).flatten(1)


def in_order(split: Split) -> tuple[Tensor, Split]:
    """Return the order of `content_order`, and the split in it."""
    order = content_order(split)
    return order, Split(split.images[order], split.labels[order])


def judge_samples(found: Suspicion, order: Tensor) -> Judgement:
    """Make a judgement about the images of the training set.

    Args:
        found: Of the images in the order in which they were judged.
        order: (N,) int64, their indices in the training set.
    """
    scores = torch.empty_like(found.scores)
    scores[order] = found.scores
    return Judgement(
        "sample",
        found.reason,
        scores=scores,
        suspicious=order[found.suspicious].sort().values,
    )


def without(split: Split, suspicious: Tensor, scores: Tensor, batch_size: int) -> Split:
    """Return the images that are not suspicious.

    If one image would be left for the last batch, on which batch norms cannot be trained, the most suspicious of these
    images is left out as well.

    Args:
        split: N images.
        suspicious: (N,) bool.
        scores: (N,); higher is more suspicious.
        batch_size: Size of the batches of the training.
    """
    kept = ~suspicious
    if int(kept.sum()) % batch_size == 1 and int(kept.sum()) > 1:
        kept[scores.masked_fill(suspicious, -torch.inf).argmax()] = False
    return Split(split.images[kept], split.labels[kept])


def members(labels: Tensor, num_classes: int) -> dict[int, Tensor]:
    """Return the places (n,) int64 of the images of each class that has at least two."""
    found = {label: (labels == label).nonzero().squeeze(1) for label in range(num_classes)}
    return {label: places for label, places in found.items() if len(places) > 1}
