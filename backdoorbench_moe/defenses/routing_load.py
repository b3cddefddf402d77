"""Routing load: reject an image with an unusual load of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.filters import InputFilter, Score
from backdoorbench_moe.defenses.requirements import check_routed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, Routing
from backdoorbench_moe.moe.trial import noise_for
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer
from backdoorbench_moe.ops.routing import load_entropy, load_shares, nearest_load

Load = Literal["experts", "patches", "gates"]
LOADS: tuple[Load, ...] = ("experts", "patches", "gates")
# A smaller variation is a rounding error.
CONSTANT = 1e-9


class RoutingLoad(InputFilter):
    """Reject an image whose patches are distributed over the experts in an unusual way, such as all to the same ones.

    The load of an image in a routed layer is the share of its selected (expert, patch) pairs that belongs to each
    expert. If patches select experts, as in V-MoE and in mixtures, all patches with a trigger may select the same ones.
    A score is computed for each routed layer; the image's score is their mean.

    If experts select patches, as in pMoE and with `router=expert-choice`, every expert selects the same number: the
    load of the experts is constant by construction. Two other loads still vary: each expert's share of the gates of the
    selected pairs, and the load of the patches, that is, the share of the pairs that belongs to each patch, which is
    uneven if all experts select the same patches. If every patch goes to every expert, only the gates vary.

    A trigger does not always make loads less even. In one run each on `signs`, the gates of a pMoE are loaded *more*
    evenly by a square in every patch than by clean images, and less evenly by a square in a corner (`bbmoe defend RUN
    --defense routing-load --set statistic=entropy` has an AUROC near 0 and near 100). The distance from clean loads
    detects both.

    Args:
        statistic: "distance": the total variation distance from the most similar load of a clean image, averaged over
            the layers. "entropy": 1 minus the entropy of the load, divided by its maximum. "largest": the largest
            share. The last two assume that triggered images concentrate on few experts.
        load: The shares of the "experts" or of the "patches" in the selected pairs, or of the experts in the "gates" of
            the selected pairs. None: "experts" if patches select experts, that is, if the load of the experts varies
            more between the defender's images than that of the patches; otherwise "gates".
        reserve: Number of the defender's images with which loads are compared, from 2; they do not set the threshold.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        threshold: A fixed threshold that replaces `fpr`; None for none.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the images are too few for `reserve` and `fpr`, the model has no routing,
            or the load is even for all images by construction.

    Source:
        Ours.
    """

    tiny: ClassVar[Mapping[str, object]] = {"statistic": "distance", "reserve": 8, "fpr": 0.25}
    reason = "the image loads the experts unlike clean images"
    purpose = "are compared with the others"

    def __init__(
        self,
        *,
        statistic: Literal["distance", "entropy", "largest"] = "distance",
        load: Load | None = None,
        reserve: int = 100,
        fpr: float = 0.05,
        threshold: float | None = None,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        check_integer("reserve", reserve, 2)
        super().__init__(
            reserved=reserve,
            fpr=fpr,
            threshold=threshold,
            calibrate=calibrate,
            clean_fraction=clean_fraction,
        )
        self.statistic, self.load, self.reserve = statistic, load, reserve

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no routing."""
        check_routed(model)

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if `load` is even for all images, like that of experts that select patches."""
        if self.load is None:
            return
        assert isinstance(model, RoutedModel)
        with noise_for(model, image_size) as images, torch.no_grad():
            loads = [_load(routing, self.load) for routing in model.forward_routed(images).routing]
        if all((load - 1 / load.shape[1]).abs().max() < CONSTANT for load in loads):
            raise ConfigError(
                f"load: {type(model).__name__} has the same load of {self.load} for all images, so that it tells "
                "nothing about a single one"
            )

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Pass the reserved images once for each candidate load and once for the chosen one; any other image once."""
        passes = 1 + (len(LOADS) if self.load is None else 1)
        return Cost(predicted=passes * self.reserve + self.calibrated(held), judged=1)

    def prepare(self, task: DefenseTask, reserved: Split) -> tuple[Score, dict[str, object]]:
        """Choose the load, and return the score, the name of the load and its variation."""
        kind, varies = self._varying(task, reserved.images)
        known = image_loads(task, reserved.images, kind)

        def score(images: Tensor) -> Tensor:
            loads = image_loads(task, images, kind)
            if self.statistic == "distance":
                return nearest_load(loads, known)
            if self.statistic == "largest":
                return torch.stack([load.amax(1) for load in loads]).mean(0)
            return 1 - torch.stack([load_entropy(load) for load in loads]).mean(0)

        return score, {"load": kind, "variation": varies}

    def _varying(self, task: DefenseTask, images: Tensor) -> tuple[Load, float]:
        """Return the option `load`; if it is None, "experts" if patches select experts, otherwise "gates".

        In expert-choice routing, the load of the experts still varies slightly if an expert can select class tokens,
        which are not reported.

        Returns:
            The load and its `variation`. If the variation is 0, as in a collapsed model, all images have the same
            score, and none is rejected.
        """
        wanted = LOADS if self.load is None else (self.load,)
        varies = {kind: variation(image_loads(task, images, kind)) for kind in wanted}
        found = wanted[0]
        if self.load is None and varies["experts"] < max(varies["patches"], CONSTANT):
            found = "gates"
        return found, varies[found]


def variation(loads: Sequence[Tensor]) -> float:
    """Return the standard deviation of shares over images, relative to an even share, averaged over the layers.

    Args:
        loads: For each routed layer (B, n), the loads of B images.
    """
    return sum((load.std(0) * load.shape[1]).mean().item() for load in loads) / len(loads)


def image_loads(task: DefenseTask, images: Tensor, kind: Load) -> list[Tensor]:
    """Return the load of each image in each routed layer, (B, n) float64 in [0, 1], of a kind of `LOADS`."""
    layers = zip(*task.routing(task.model, images), strict=True)
    return [torch.cat([_load(routing, kind) for routing in layer]) for layer in layers]


def _load(routing: Routing, kind: Load) -> Tensor:
    weights = routing.gates.double() * routing.selected if kind == "gates" else routing.selected.double()
    return load_shares(weights, "patches" if kind == "patches" else "experts")
