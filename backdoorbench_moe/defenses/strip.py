"""STRIP, and the same on routing: is an image's answer too constant when others are laid over it?"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.parts import check_routed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.detection import alarms, threshold
from backdoorbench_moe.ops.routing import jaccard
from backdoorbench_moe.ops.seeding import generator

Blend = Literal["mean", "sum"]
# Blends are made 8,000 of 32x32 at a time: 25 MB.
CHUNK_VALUES = 8000 * 3 * 32 * 32


class BlendFilter(Defense):
    """An input filter that lays clean images over an input and scores how constant what the model does stays.

    blends: how many of the defender's images, from 2, are laid over each input; drawn once, and the same for
    every input, so that the filter is a function of the image (the original draws them for each input). blend:
    "mean" of the two images, or their "sum", cut off at white, as the original's code has it, in which a black
    trigger vanishes. calibrate: up to this many of the defender's other images set the threshold, so that a
    clean image like them is rejected with a chance of `fpr`, in (0, 1), at most (the original fits a normal
    distribution). clean_fraction: share of the training images the defender holds, which the victim has seen.
    Raises ConfigError for values out of range, and where there are too few images for the blends and for `fpr`.

    The model is left as it is. Verdict: the threshold, and how many images set it. Source: Gao et al., STRIP
    (ACSAC 2019), §4.
    """

    tiny: ClassVar[Mapping[str, object]] = {"blends": 4, "fpr": 0.25}
    reason: ClassVar[str]

    def __init__(
        self,
        *,
        blends: int = 16,
        blend: Blend = "mean",
        fpr: float = 0.05,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if blends < 2:
            raise ConfigError.expected("blends", "a whole number from 2", blends)
        if not 0 < fpr < 1:
            raise ConfigError.expected("fpr", "a number in (0, 1)", fpr)
        if not alarms(fpr, calibrate):
            raise ConfigError.expected("calibrate", f"enough images to tell an fpr of {fpr}", calibrate)
        self.blends, self.blend, self.fpr, self.calibrate = blends, blend, fpr, calibrate

    def count(self, images: int, num_classes: int) -> int:
        """How many of `images` training images the defender holds. Raises ConfigError for too few."""
        count = super().count(images, num_classes)
        left = count - self.blends
        if not alarms(self.fpr, left):
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; {self.blends} are laid over "
                f"the others, and the {max(left, 0)} left are too few to set a threshold for fpr={self.fpr}"
            )
        return count

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Draw the images to lay over, and find the threshold on others."""
        clean = task.clean.images
        order = torch.randperm(len(clean), generator=generator(task.seed, "blends")).to(clean.device)
        over, others = order[: self.blends], order[self.blends : self.blends + self.calibrate]
        judge = partial(
            score_blends, overlays=clean[over].clone(), blend=self.blend, constancy=self.judge(task)
        )
        at = threshold(judge(clean[others]).double().cpu().numpy(), self.fpr)
        judged = Judgement(
            "input",
            f"{self.reason}; a clean image is above the threshold with a chance of {self.fpr:g} at most",
            threshold=at,
            details={"calibrated_on": len(others)},
            judge=judge,
        )
        return DefenseResult("filtered", task.model, (judged,))

    @abstractmethod
    def judge(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """What scores blends: (N * n, 3, H, W) uint8, the n of an image side by side, and n, to (N,)."""


def score_blends(
    images: Tensor, *, overlays: Tensor, blend: Blend, constancy: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Score (N, 3, H, W) uint8 images by how constant their blends with (n, 3, H, W) stay: (N,) float64."""
    size = max(1, CHUNK_VALUES // overlays.numel())
    found = [
        constancy(superimpose(part, overlays, blend).flatten(0, 1), len(overlays))
        for part in images.split(size)
    ]
    return torch.cat(found)


def superimpose(images: Tensor, overlays: Tensor, blend: Blend) -> Tensor:
    """Blend (N, C, H, W) with (n, C, H, W), both uint8: (N, n, C, H, W) uint8, the mean rounded down."""
    total = images.unsqueeze(1).short() + overlays.unsqueeze(0).short()
    return (total.div(2, rounding_mode="floor") if blend == "mean" else total.clamp(max=255)).to(torch.uint8)


class Strip(BlendFilter):
    """STRIP: an image is suspicious whose prediction stays sure and the same whatever is laid over it.

    The score is minus the mean entropy, in nats, of the predictions of the blends. Takes any model. Options: see
    `BlendFilter`. Source: Gao et al., ACSAC 2019, §4.
    """

    reason = "predictions stay sure whatever clean image is laid over the input"

    def judge(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """Minus the mean entropy of predictions."""
        return lambda blends, count: -mean_entropy(task.logits(task.model, blends), count)


class RoutingStrip(BlendFilter):
    """STRIP's idea on routing: an image is suspicious whose routing stays too constant whatever is laid over it.

    statistic: "jaccard", mean Jaccard index of the selected (expert, patch) pairs of two blends, over all pairs
    of blends; or "jensen-shannon", 1 minus the gates' mean divergence from their mean over the blends, as a
    share of its largest value. Both in [0, 1], mean over the routed layers. Other options: see `BlendFilter`.
    Raises ConfigError for a model without routing.
    """

    reason = "routing stays constant whatever clean image is laid over the input"

    def __init__(
        self,
        *,
        statistic: Literal["jaccard", "jensen-shannon"] = "jaccard",
        blends: int = 16,
        blend: Blend = "mean",
        fpr: float = 0.05,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(
            blends=blends, blend=blend, fpr=fpr, calibrate=calibrate, clean_fraction=clean_fraction
        )
        self.statistic = statistic

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no routing."""
        check_routed(model)

    def judge(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """How constant the routing is."""
        name = "selected" if self.statistic == "jaccard" else "gates"
        measure = selection_constancy if self.statistic == "jaccard" else gate_constancy

        def constancy(blends: Tensor, count: int) -> Tensor:
            layers = zip(*task.routing(task.model, blends), strict=True)
            tables = (torch.cat([getattr(routing, name) for routing in layer]) for layer in layers)
            return torch.stack([measure(table.unflatten(0, (-1, count))) for table in tables]).mean(0)

        return constancy


def mean_entropy(logits: Tensor, count: int) -> Tensor:
    """Mean entropy, in nats, of the predictions of each `count` of (N * count, classes) logits: (N,) float64."""
    chances = logits.double().softmax(1)
    return torch.special.entr(chances).sum(1).unflatten(0, (-1, count)).mean(1)


def selection_constancy(selected: Tensor) -> Tensor:
    """Mean Jaccard index of two of n selections, over all pairs: (N, n, E, P) bool to (N,) float64 in [0, 1]."""
    count = selected.shape[1]
    pairs = torch.ones(count, count, dtype=torch.bool, device=selected.device).triu(1)
    chosen = selected.flatten(2)
    return jaccard(chosen, chosen)[:, pairs].double().mean(1)


def gate_constancy(gates: Tensor) -> Tensor:
    """1 - JS / log n of n sets of gates: (N, n, E, P) to (N,) float64 in [0, 1].

    JS is the mean Kullback-Leibler divergence of the gates from their mean over the n. A set of gates is taken as
    one distribution over (expert, patch); for gates that sum to 1 over the patches of every expert, or over
    the experts of every patch, that is the mean divergence of an expert's, or a patch's, distribution.
    """
    tables = gates.flatten(2).double()
    tables = tables / tables.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    mixture = torch.special.entr(tables.mean(1)).sum(1)
    divergence = mixture - torch.special.entr(tables).sum(2).mean(1)
    return 1 - divergence.clamp(min=0) / math.log(gates.shape[1])
