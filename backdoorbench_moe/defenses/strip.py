"""STRIP, and STRIP on routing: input filters that superimpose clean images on each input."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.filters import InputFilter, Score
from backdoorbench_moe.defenses.requirements import check_routed
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer
from backdoorbench_moe.ops.routing import jaccard

BlendMode = Literal["mean", "sum"]
# Largest number of pixel values that are processed at a time: 8,000 images of 3x32x32, 25 MB.
CHUNK_VALUES = 8000 * 3 * 32 * 32


class SuperpositionFilter(InputFilter):
    """Base class of input filters that blend an input with clean images and measure how little the model reacts.

    A backdoored model's prediction for a triggered image depends mostly on the trigger. It therefore stays the same if
    another image is blended in. Images to which the model reacts least are rejected. The model is not changed.

    Subclasses implement `measure_constancy`, and set `reason`, the first half of the judgement's reason.

    Departures: STRIP draws new images to blend for each input; here, they are drawn once, so that the same input always
    gets the same score. STRIP fits a normal distribution to the scores of clean images; here, the threshold is a
    quantile of these scores. STRIP's code blends by "sum", and 100 images.

    Args:
        blends: Number of the defender's images that each input is blended with, at least 2.
        blend: How two images are blended: "mean"; or "sum", clipped at white as in STRIP's code, which hides a black
            trigger.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]. The model was trained on them.

    Raises:
        ConfigError: A value is out of range, or the images are too few for `blends` and `fpr`.

    Source:
        Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019, section 4.
    """

    tiny: ClassVar[Mapping[str, object]] = {"blends": 4, "fpr": 0.25}
    purpose = "are blended into the others"
    draw = "blends"

    def __init__(
        self,
        *,
        blends: int = 16,
        blend: BlendMode = "mean",
        fpr: float = 0.05,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        check_integer("blends", blends, 2)
        super().__init__(
            reserved=blends, fpr=fpr, threshold=None, calibrate=calibrate, clean_fraction=clean_fraction
        )
        self.blends, self.blend = blends, blend

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Pass the superpositions of the images that set the threshold; later, those of every input."""
        return Cost(predicted=self.calibrated(held) * self.blends, judged=self.blends)

    def prepare(self, task: DefenseTask, reserved: Split) -> tuple[Score, dict[str, object]]:
        """Return the score, which blends the reserved images into each input."""
        score = partial(
            score_superpositions,
            overlays=reserved.images,
            mode=self.blend,
            constancy=self.measure_constancy(task),
        )
        return score, {}

    @abstractmethod
    def measure_constancy(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """Return a function that measures how little the model reacts to the images that are blended in.

        Args:
            task: The task with the model.

        Returns:
            A function `constancy(images, n)`. Its images, (B * n, 3, H, W) uint8, are the n superpositions of the first
            input, followed by those of the second, and so on. It returns (B,) scores; higher if the model reacts less.
        """


def score_superpositions(
    images: Tensor, *, overlays: Tensor, mode: BlendMode, constancy: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Score images by how little the model reacts when other images are blended in.

    Args:
        images: (B, 3, H, W) uint8.
        overlays: (n, 3, H, W) uint8, the images to blend in.
        mode: How two images are blended.
        constancy: See `SuperpositionFilter.measure_constancy`.

    Returns:
        (B,) float64; higher is more suspicious.
    """
    size = max(1, CHUNK_VALUES // overlays.numel())
    scores = [
        constancy(superimpose(chunk, overlays, mode).flatten(0, 1), len(overlays))
        for chunk in images.split(size)
    ]
    return torch.cat(scores)


def superimpose(images: Tensor, overlays: Tensor, mode: BlendMode) -> Tensor:
    """Blend every image with every overlay.

    Args:
        images: (B, C, H, W) uint8.
        overlays: (n, C, H, W) uint8.
        mode: "mean", rounded down, or "sum", clipped at 255.

    Returns:
        (B, n, C, H, W) uint8.
    """
    total = images.unsqueeze(1).short() + overlays.unsqueeze(0).short()
    return (total.div(2, rounding_mode="floor") if mode == "mean" else total.clamp(max=255)).to(torch.uint8)


class Strip(SuperpositionFilter):
    """STRIP: reject an image if its prediction stays confident when clean images are blended in.

    The score is the negative mean entropy, in nats, of the predictions for the blended images.

    Departures: the images to blend are drawn once; STRIP draws new ones for each input. The threshold is a quantile of
    the scores of clean images; STRIP fits a normal distribution to them. STRIP's code blends by "sum", and 100 images.

    Args:
        blends: Number of the defender's images that each input is blended with, at least 2.
        blend: How two images are blended: "mean", or "sum", clipped at white.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the images are too few for `blends` and `fpr`.

    Source:
        Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019, section 4.
    """

    reason = "predictions stay confident whatever clean image is blended into the input"

    def measure_constancy(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """Return a function that measures the negative mean entropy of the predictions."""
        return lambda blended, count: -mean_entropy(task.logits(task.model, blended), count)


class RoutingStrip(SuperpositionFilter):
    """STRIP on routing: reject an image if its routing stays the same when clean images are blended in.

    It requires a routed model. The score is the mean of `statistic` over the routed layers. Otherwise it works like
    `strip`.

    Args:
        statistic: Measure of how constant the routing is over the superpositions of an input, in [0, 1]. "jaccard":
            Jaccard index of the (expert, patch) pairs that are selected in two superpositions, averaged over all pairs
            of superpositions. "jensen-shannon": 1 - JS / log(blends), where JS is the Jensen-Shannon divergence of the
            gates of all superpositions and log(blends) its maximum.
        blends: Number of the defender's images that each input is blended with, at least 2.
        blend: How two images are blended: "mean", or "sum", clipped at white.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the images are too few for `blends` and `fpr`, or the model has no
            routing.

    Source:
        Ours; it applies the idea of STRIP (Gao et al., ACSAC 2019) to routing instead of predictions.
    """

    reason = "routing stays constant whatever clean image is blended into the input"

    def __init__(
        self,
        *,
        statistic: Literal["jaccard", "jensen-shannon"] = "jaccard",
        blends: int = 16,
        blend: BlendMode = "mean",
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

    def measure_constancy(self, task: DefenseTask) -> Callable[[Tensor, int], Tensor]:
        """Return a function that measures the statistic, averaged over the routed layers."""
        name = "selected" if self.statistic == "jaccard" else "gates"
        measure = selection_constancy if self.statistic == "jaccard" else gate_constancy

        def constancy(blended: Tensor, count: int) -> Tensor:
            layers = zip(*task.routing(task.model, blended), strict=True)
            tables = (torch.cat([getattr(routing, name) for routing in layer]) for layer in layers)
            return torch.stack([measure(table.unflatten(0, (-1, count))) for table in tables]).mean(0)

        return constancy


def mean_entropy(logits: Tensor, count: int) -> Tensor:
    """Compute the mean entropy of the predictions for the superpositions of each image.

    Args:
        logits: (B * n, classes); n consecutive rows belong to the same image.
        count: Number of superpositions n of each image.

    Returns:
        (B,) float64, in nats.
    """
    probabilities = logits.double().softmax(1)
    return torch.special.entr(probabilities).sum(1).unflatten(0, (-1, count)).mean(1)


def selection_constancy(selected: Tensor) -> Tensor:
    """Compute the Jaccard index of two selections of (expert, patch) pairs, averaged over all pairs of n selections.

    Args:
        selected: (B, n, E, P) bool, n selections for each of B images.

    Returns:
        (B,) float64 in [0, 1].
    """
    count = selected.shape[1]
    pairs = torch.ones(count, count, dtype=torch.bool, device=selected.device).triu(1)
    chosen = selected.flatten(2)
    return jaccard(chosen, chosen)[:, pairs].double().mean(1)


def gate_constancy(gates: Tensor) -> Tensor:
    """Compute 1 - JS / log n, where JS is the Jensen-Shannon divergence of n sets of gates.

    The gates (E, P) of each set are first normalised to one distribution over all (expert, patch) pairs. JS is the mean
    of the Kullback-Leibler divergences of the n distributions from their mean; its maximum is log n. If the gates of
    each expert sum to 1 over the patches, JS equals the mean over the experts of their own divergences. If the gates
    of each patch sum to 1 over the experts, it equals the mean over the patches.

    Args:
        gates: (B, n, E, P), not negative: n sets of gates for each of B images.

    Returns:
        (B,) float64 in [0, 1].
    """
    tables = gates.flatten(2).double()
    tables = tables / tables.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    mixture = torch.special.entr(tables.mean(1)).sum(1)
    divergence = mixture - torch.special.entr(tables).sum(2).mean(1)
    return 1 - divergence.clamp(min=0) / math.log(gates.shape[1])
