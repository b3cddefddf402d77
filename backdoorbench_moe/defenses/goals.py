"""Goals of trigger inversion: images that are classified as a class, or patches that are routed to an expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.defenses.stamps import blend_pattern, keep_tiles, stamp_all
from backdoorbench_moe.moe.capture import Choice, choice_of, of_experts, patch_losses
from backdoorbench_moe.moe.precision import in_precision
from backdoorbench_moe.moe.routed import RoutedModel, Routing
from backdoorbench_moe.ops.images import Split, as_input


@dataclass(frozen=True)
class Outcome:
    """The effect of K stamps on a batch.

    Args:
        losses: (K,), lower if a stamp is closer to its target; with gradients.
        hits: (K,), the number of images, or patches, for which a stamp reaches its target.
        counts: (K,), the number of images, or patches, for which it could reach the target.
    """

    losses: Tensor
    hits: Tensor
    counts: Tensor


class Goal(ABC):
    """Base class of goals: a set of targets, for each of which a stamp can be searched.

    Args:
        model: The model, in evaluation mode.
        clean: Images and their true labels, on the model's device.
        precision: "fp32" or "bf16".
        side: Side of the tiles that are stamped; None if a stamp covers the full image.

    Attributes:
        about: What the targets are, as in `Judgement.about`.
        names: The name of each target.
        groups: Numbers of the targets, grouped so that the sizes of stamps are comparable within a group.
    """

    about: Literal["class", "expert"]
    names: list[str]
    groups: list[list[int]]

    def __init__(self, model: nn.Module, clean: Split, precision: str, side: int | None) -> None:
        self.model, self.clean, self.precision, self.side = model, clean, precision, side

    def stamp(self, rows: Tensor, values: Tensor) -> Tensor:
        """Stamp clean images with each of K stamps.

        Args:
            rows: (B,) int64, the numbers of the images.
            values: (K, 4, h, w) in [0, 1], masks and patterns.

        Returns:
            (K, B, 3, H, W) in [0, 1].
        """
        return stamp_all(blend_pattern, as_input(self.clean.images[rows]), values, self.side)

    @abstractmethod
    def outcome(self, stamped: Tensor, rows: Tensor, targets: Sequence[int]) -> Outcome:
        """Evaluate one stamp for each of K targets.

        Args:
            stamped: (K, B, 3, H, W) in [0, 1], images with each of the stamps.
            rows: (B,) int64, the numbers of the images.
            targets: The number of each target.
        """

    def rows(self, target: int) -> Tensor:
        """Return the numbers of the clean images on which the success of a stamp is measured, (n,) int64."""
        return torch.arange(len(self.clean), device=self.clean.images.device)


class ClassGoal(Goal):
    """The model classifies images of other classes as the target class; the loss is the cross-entropy.

    Args:
        model: See `Goal`.
        clean: See `Goal`.
        precision: See `Goal`.
        side: See `Goal`.
        num_classes: Number of classes.
    """

    about = "class"

    def __init__(
        self, model: nn.Module, clean: Split, precision: str, side: int | None, num_classes: int
    ) -> None:
        super().__init__(model, clean, precision, side)
        self.names = [str(label) for label in range(num_classes)]
        self.groups = [list(range(num_classes))]

    def rows(self, target: int) -> Tensor:
        """The images of other classes."""
        return (self.clean.labels != target).nonzero().flatten()

    def outcome(self, stamped: Tensor, rows: Tensor, targets: Sequence[int]) -> Outcome:
        """Predict, and compare with the target classes."""
        labels = torch.tensor(targets, device=rows.device).unsqueeze(1)
        with in_precision(rows.device, self.precision):
            logits = self.model(_flat(stamped))
        logits = logits.float().unflatten(0, stamped.shape[:2])
        others = self.clean.labels[rows] != labels
        wanted = labels.expand(-1, len(rows))
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        fooled = (losses * others).sum(1) / others.sum(1).clamp(min=1)
        return Outcome(fooled, ((logits.argmax(2) == labels) & others).sum(1), others.sum(1))


@dataclass(frozen=True)
class RoutedLayer:
    """The routing of clean images in one layer.

    Args:
        name: Dotted name of the layer.
        selected: (N, E, P) bool, the patches that each expert processes.
        choice: What the router chooses, see `choice_of`.
        places: The largest number of patches of an image that an expert processes.
    """

    name: str
    selected: Tensor
    choice: Choice
    places: int


class ExpertGoal(Goal):
    """The router sends stamped patches to one expert of one layer; a stamp has the size of a patch.

    The success of a stamp is the share of the stamped patches that the expert processes. Patches that the expert
    processes without the stamp are left out, as `ClassGoal` leaves out images of the target class: a stamp that changes
    nothing captures nothing. The loss is the mean of `patch_losses` over the same patches.

    Args:
        model: See `Goal`.
        clean: See `Goal`.
        precision: See `Goal`.
        routing: The routing of the clean images, batch by batch.
        places: (N,) int64, the one patch of each image that is stamped; None if all patches are stamped.
    """

    about = "expert"
    model: RoutedModel

    def __init__(
        self,
        model: RoutedModel,
        clean: Split,
        precision: str,
        routing: Iterable[list[Routing]],
        places: Tensor | None,
    ) -> None:
        super().__init__(model, clean, precision, model.patch_size)
        self.places = places
        self.layers = [_join(batches) for batches in zip(*routing, strict=True)]
        # A target is a pair: number of the layer, number of the expert.
        self.targets = [
            (number, expert)
            for number, layer in enumerate(self.layers)
            for expert in range(layer.selected.shape[1])
        ]
        self.names = [f"{self.layers[number].name}/{expert}" for number, expert in self.targets]
        self.groups = [
            [target for target, (layer, _) in enumerate(self.targets) if layer == number]
            for number in range(len(self.layers))
        ]

    def stamp(self, rows: Tensor, values: Tensor) -> Tensor:
        """Stamp the one patch of each image, or all patches."""
        stamped = super().stamp(rows, values)
        if self.places is None:
            return stamped
        images = as_input(self.clean.images[rows])
        return keep_tiles(images, stamped, self.places[rows], self.model.patch_size)

    def outcome(self, stamped: Tensor, rows: Tensor, targets: Sequence[int]) -> Outcome:
        """Route, and compare with the target experts, layer by layer."""
        with in_precision(rows.device, self.precision):
            routing = self.model.forward_routed(_flat(stamped)).routing
        found: list[Outcome] = []
        first = 0
        for number, group in groupby((self.targets[target] for target in targets), key=itemgetter(0)):
            experts = torch.tensor([expert for _, expert in group], device=rows.device)
            own = slice(first, first := first + len(experts))
            layer = self.layers[number]
            gates = routing[number].gates.unflatten(0, stamped.shape[:2])[own]
            selected = routing[number].selected.unflatten(0, stamped.shape[:2])[own]
            losses = patch_losses(gates, experts, layer.choice, layer.places)
            counted = ~layer.selected[rows][:, experts].transpose(0, 1)
            if self.places is not None:
                patches = torch.arange(counted.shape[-1], device=rows.device)
                counted = counted & (patches == self.places[rows].unsqueeze(1))
            counts = counted.sum((1, 2))
            loss = (losses * counted).sum((1, 2)) / counts.clamp(min=1)
            found.append(Outcome(loss, (of_experts(selected, experts) & counted).sum((1, 2)), counts))
        return Outcome(
            torch.cat([each.losses for each in found]),
            torch.cat([each.hits for each in found]),
            torch.cat([each.counts for each in found]),
        )


def _flat(stamped: Tensor) -> Tensor:
    """Return stamped images (K, B, 3, H, W) as one batch (K * B, 3, H, W)."""
    return stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _join(batches: Sequence[Routing]) -> RoutedLayer:
    """Join the routing of one layer over all batches of images."""
    selected = torch.cat([batch.selected for batch in batches])
    whole = Routing(batches[0].layer, torch.cat([batch.gates for batch in batches]), selected)
    return RoutedLayer(whole.layer, selected, choice_of(whole), int(selected.sum(-1).max()))
