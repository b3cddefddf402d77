"""Routing load: reject an image whose patches crowd at few experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.filters import InputFilter, Score
from backdoorbench_moe.defenses.requirements import check_routed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.routing import load_entropy, load_shares, nearest_load

Load = Literal["experts", "patches", "gates"]
LOADS: tuple[Load, ...] = ("experts", "patches", "gates")


class RoutingLoad(InputFilter):
    """Reject an image whose patches are distributed over the experts in an unusual way, such as all to the same ones.

    The load of a routed layer by one image is the share of its selected (expert, patch) pairs that belongs to each
    expert. Where patches select experts, as in V-MoE and in mixtures, patches with a trigger may all select the same. A
    score is computed for each routed layer; the image's score is their mean.

    Where experts select patches, as in pMoE and with `router=expert-choice`, every expert selects equally many: the
    load of the experts is constant by construction. What can collapse is the other side: all experts may select the
    same patches. The load is then that of the patches: the share of the pairs that belongs to each patch. Where patches
    select experts, that one is constant. If every patch goes to every expert, both are, and the gates remain.

    Args:
        statistic: "entropy": 1 minus the entropy of the load, divided by its maximum. "largest": the largest share.
            "distance": the total variation distance from the most similar load of a clean image, in the mean over the
            layers; it needs no collapse, but any load that clean images do not have.
        load: The shares of the "experts" or of the "patches" in the selected pairs, or of the experts in the "gates" of
            the selected pairs. None: the first of the three that is not the same for all of the defender's images.
        reserve: Number of the defender's images that loads are compared with, from 2; they do not set the threshold.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        threshold: A fixed threshold, which takes the place of `fpr`; None for none.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the images are too few for `reserve` and `fpr`, the model has no routing,
            or its load is constant.

    Source:
        Ours.
    """

    tiny: ClassVar[Mapping[str, object]] = {"statistic": "distance", "reserve": 8, "fpr": 0.25}
    reason = "the image loads the experts unlike clean images"
    purpose = "are compared with the others"

    def __init__(
        self,
        *,
        statistic: Literal["entropy", "largest", "distance"] = "entropy",
        load: Load | None = None,
        reserve: int = 100,
        fpr: float = 0.05,
        threshold: float | None = None,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        if reserve < 2:
            raise ConfigError.expected("reserve", "an integer of at least 2", reserve)
        super().__init__(
            reserved=reserve,
            fpr=fpr,
            threshold=threshold,
            calibrate=calibrate,
            clean_fraction=clean_fraction,
        )
        self.statistic, self.load, self.reserve = statistic, load, reserve
        self._load: Load = load or "experts"

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no routing."""
        check_routed(model)

    def prepare(self, task: DefenseTask, reserved: Split) -> Score:
        """Find the load that varies, and return the score."""
        self._load = self._varying(task, reserved.images)
        known = image_loads(task, reserved.images, self._load)

        def score(images: Tensor) -> Tensor:
            loads = image_loads(task, images, self._load)
            if self.statistic == "distance":
                return nearest_load(loads, known)
            if self.statistic == "largest":
                return torch.stack([load.amax(1) for load in loads]).mean(0)
            return 1 - torch.stack([load_entropy(load) for load in loads]).mean(0)

        return score

    def details(self) -> dict[str, object]:
        """Return which load is scored."""
        return {"load": self._load}

    def _varying(self, task: DefenseTask, images: Tensor) -> Load:
        """Return the load that is wanted, or the first that is not the same for all images.

        Raises:
            ConfigError: There is none.
        """
        wanted = LOADS if self.load is None else (self.load,)
        for kind in wanted:
            if any((load != load[:1]).any() for load in image_loads(task, images, kind)):
                return kind
        raise ConfigError(
            f"load: {type(task.model).__name__} has the same load of {' and '.join(wanted)} for all images, "
            "so that it tells nothing about a single one"
        )


def image_loads(task: DefenseTask, images: Tensor, kind: Load) -> list[Tensor]:
    """Return the load of each routed layer by each image, (B, n) float64 in [0, 1], of a kind of `LOADS`."""
    layers = zip(*task.routing(task.model, images), strict=True)
    return [torch.cat([_load(routing, kind) for routing in layer]) for layer in layers]


def _load(routing: Routing, kind: Load) -> Tensor:
    weights = routing.gates.double() * routing.selected if kind == "gates" else routing.selected.double()
    return load_shares(weights, "patches" if kind == "patches" else "experts")
