"""The base class of defenses that score the training images, remove some of them, and retrain the model."""

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
    """The findings of a `SampleFilter` about N training images.

    Args:
        scores: (N,) floats; higher is more suspicious.
        suspicious: (N,) bool, the images to remove.
        reason: See `Judgement`.
        others: Further judgements, such as about classes.
    """

    scores: Tensor
    suspicious: Tensor
    reason: str
    others: tuple[Judgement, ...] = ()


class SampleFilter(Defense):
    """Base class of defenses that represent each training image by a vector, and remove images based on these vectors.

    The vector of an image is the input of the model's head (its features), or its routing: the concatenated gates
    (E, P) of all routed layers. For "routing", the gates of each expert are sorted in descending order. They then show
    how strongly the expert prefers some patches, but not where these are, so the position of a trigger does not matter.
    For "routing-map", they stay in the order of the patches. Means over the patches would be useless in expert-choice
    routing, where they are the same for all images.

    If images are removed, a newly initialised model is trained on the remaining ones with the run's recipe. The images
    are first sorted by their contents, so neither the judgement nor the new model depends on the order of the training
    set.

    Subclasses implement `judge`.

    Args:
        on: The vectors: "features", the input of the head; or "routing" or "routing-map", as above.
        retrain: Whether to train a new model without the removed images.
        epochs: Epochs of this training, from 1; those of the run's recipe if None.
        clean_fraction: Share of the training images that the defender knows to be clean, in (0, 1]; used only by
            defenses that need "clean".

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
        """Raise ConfigError if the vectors are routing vectors and the model has no routing."""
        if self.on != "features":
            check_routed(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Compute the vectors of the training images and of those that the defender holds, and retrain.

        This is an upper bound: removed images are not trained on, and if there are none, no model is trained.
        """
        epochs = (self.epochs or recipe.epochs) if self.retrain else 0
        return Cost(trained=epochs * train, predicted=train + held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Judge the training images, and retrain without the suspicious ones."""
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
        placed: Whether the gates of each expert stay in the order of the patches; otherwise they are sorted in
            descending order.
    """
    gates = routing.gates.float()
    return (gates if placed else gates.sort(2, descending=True).values).flatten(1)


def in_order(split: Split) -> tuple[Tensor, Split]:
    """Return the order of `content_order`, and the split in it."""
    order = content_order(split)
    return order, Split(split.images[order], split.labels[order])


def judge_samples(found: Suspicion, order: Tensor) -> Judgement:
    """Build the judgement about the images of the training set.

    Args:
        found: The findings, for the images in the order in which they were judged.
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

    Batch norms cannot be trained on a batch of one image. If the last batch would have only one, the most suspicious of
    the remaining images is left out as well.

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
    """Return the indices (n,) int64 of the images of each class that has at least two."""
    found = {label: (labels == label).nonzero().squeeze(1) for label in range(num_classes)}
    return {label: places for label, places in found.items() if len(places) > 1}
