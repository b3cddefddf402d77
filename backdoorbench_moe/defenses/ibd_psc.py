"""IBD-PSC: reject an image whose prediction stays confident when the parameters of the last norms are scaled up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.filters import InputFilter, Score
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.temporary import hooked, restored
from backdoorbench_moe.moe.units import norm_units
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer, check_share


class IBDPSC(InputFilter):
    """IBD-PSC: reject an image whose prediction stays confident when the last norms' scales and shifts are scaled up.

    The scales and shifts of the last k norms are multiplied by `factor`, for `models` consecutive values of k. The
    score is the probability of the class that the original model predicts, averaged over these scaled models. The first
    k is the smallest for which the scaled model misclassifies more than `error` of the reserved images; if there is
    none, or too few norms are left, the last `models` values are used. The detail "norms" of the judgement lists the
    values of k.

    Norms are counted in the order in which they are computed.

    Departures: by default, the threshold is a quantile of the scores of clean images (`fpr`), see `threshold`. The
    paper scales batch norms; here, layer and group norms are scaled as well. The values of k are those of the paper;
    BackdoorBox's code uses the next larger ones, k + 1 to k + `models`.

    Args:
        factor: Factor of scales and shifts, above 1.
        models: Number of scaled models, from 1.
        error: Share of the reserved images that the first scaled model must misclassify, in [0, 1].
        reserve: Number of the defender's images that are used to choose the first k, from 1; they do not set the
            threshold.
        fpr: Highest false positive rate, in (0, 1): the probability that a clean image is rejected.
        threshold: A fixed threshold that replaces `fpr`; None for none. It is 0.9 in the paper.
        calibrate: Largest number of the defender's other images that are used to set the threshold.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the images are too few for `reserve` and `fpr`, or the model has too few
            norms.

    Source:
        Hou et al., "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency", ICML 2024,
        section 4.
    """

    tiny: ClassVar[Mapping[str, object]] = {"models": 2, "reserve": 8, "fpr": 0.25}
    reason = "the prediction stays confident when the scales of the last norms are increased"
    purpose = "choose how many norms are scaled"

    def __init__(
        self,
        *,
        factor: float = 1.5,
        models: int = 5,
        error: float = 0.6,
        reserve: int = 100,
        fpr: float = 0.05,
        threshold: float | None = None,
        calibrate: int = 1000,
        clean_fraction: float = 0.05,
    ) -> None:
        for name, number in (("models", models), ("reserve", reserve)):
            check_integer(name, number, 1)
        super().__init__(
            reserved=reserve,
            fpr=fpr,
            threshold=threshold,
            calibrate=calibrate,
            clean_fraction=clean_fraction,
        )
        if not 1 < factor < float("inf"):
            raise ConfigError.expected("factor", "a number above 1", factor)
        check_share(error=error)
        self.factor, self.models, self.error, self.reserve = factor, models, error, reserve

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has fewer than `models` norms."""
        self._check_norms(model, len(norm_units(model)))

    def _check_norms(self, model: nn.Module, count: int) -> None:
        if count < self.models:
            raise ConfigError(
                f"models: expected at most the number of norms with a scale; {type(model).__name__} has {count}, "
                f"got {self.models}"
            )

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Choose the scaled models with the reserved images; pass each image through the original and scaled models.

        This is an upper bound, since the search ends with the first number of norms that fits.
        """
        tried, passes = len(norm_units(model)) - self.models, 1 + self.models
        ordered = min(2, self.reserve)
        return Cost(predicted=ordered + tried * self.reserve + passes * self.calibrated(held), judged=passes)

    def prepare(self, task: DefenseTask, reserved: Split) -> tuple[Score, dict[str, object]]:
        """Choose the numbers of norms to scale, and return the score and these numbers."""
        model = task.model
        norms = norms_in_order(task, reserved.images[:2])
        # A model may have norms that it does not call.
        self._check_norms(model, len(norms))
        chosen = self._choose(task, norms, reserved)

        def score(images: Tensor) -> Tensor:
            called = task.logits(model, images).argmax(1, keepdim=True)
            total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
            for count in chosen:
                with scaled(norms[-count:], self.factor):
                    logits = task.logits(model, images)
                total = total + logits.double().softmax(1).gather(1, called).squeeze(1)
            return total / len(chosen)

        return score, {"norms": chosen}

    def _choose(self, task: DefenseTask, norms: Sequence[nn.Module], reserved: Split) -> list[int]:
        last = max(1, len(norms) - self.models + 1)
        for first in range(1, last):
            with scaled(norms[-first:], self.factor):
                wrong = task.logits(task.model, reserved.images).argmax(1) != reserved.labels
            if wrong.double().mean() > self.error:
                return list(range(first, first + self.models))
        return list(range(last, len(norms) + 1))


def norms_in_order(task: DefenseTask, images: Tensor) -> list[nn.Module]:
    """Return the norms with a scale in the order in which the model calls them.

    Args:
        task: The task with the model.
        images: (B, 3, H, W) uint8, passed through the model once.
    """
    found: dict[nn.Module, None] = {}
    norms = [task.model.get_submodule(units.layer) for units in norm_units(task.model)]

    def note(module: nn.Module, _: object) -> None:
        found[module] = None

    with hooked(norm.register_forward_pre_hook(note) for norm in norms):
        task.logits(task.model, images)
    return list(found)


@contextmanager
def scaled(norms: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Multiply the scales and shifts of norms inside the block. Afterwards, they are restored exactly."""
    tensors = [p for norm in norms for p in (norm.weight, norm.bias) if isinstance(p, Tensor)]
    with restored(tensors):
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(factor)
        yield
