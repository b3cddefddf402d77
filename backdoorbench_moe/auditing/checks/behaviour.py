"""Checks of how predictions of clean images change when images or weights are scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_moe.auditing.check import Check, Measured, NotTested
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.ibd_psc import IBDPSC, norms_in_order, scaled
from backdoorbench_moe.defenses.scale_up import multiply
from backdoorbench_moe.engine.inference import classes_of
from backdoorbench_moe.moe.units import norm_units
from backdoorbench_moe.ops.images import Split

# Of SCALE-UP and IBD-PSC.
FACTORS = (3, 5, 7, 9, 11)
NORM_FACTOR, MODELS = 1.5, 5
CONCENTRATION = "the largest share of other images that become one class, in the mean over five scales"


class ScaledImages(Check):
    """Whether brightened images are predicted as one class.

    SCALE-UP rejects inputs whose prediction does not change when their pixels are multiplied. Here the given images are
    multiplied, and the score is the share of images that are then predicted as one class.
    """

    name = "scaled-images"
    title = "what brightened images become"
    needs = ("images",)
    explains = CONCENTRATION
    source = "the scaling is that of Guo et al., ICLR 2023 (SCALE-UP); the statistic is ours"

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of passing each image with every factor."""
        return Cost(predicted=len(FACTORS) * len(subject.split))

    def measure(self, subject: Subject) -> Measured:
        """Multiply the images and count the predicted classes."""
        images, logits = subject.split.images, subject.task.logits
        after = [classes_of(logits(subject.model, multiply(images, factor))) for factor in FACTORS]
        agreement = torch.stack([(each == subject.predicted).double().mean() for each in after]).mean()
        share, label = concentration(subject.predicted, after, subject.num_classes)
        reason = (
            f"{share:.0%} of the images of other classes become {subject.class_name(label)} "
            "when they are brightened 3 to 11 times"
        )
        return Measured(share, reason, {"class": label, "agreement": agreement.item()})


class ScaledNorms(Check):
    """Whether a model with scaled last norms predicts one class for all images.

    IBD-PSC scales the last norms until the model misclassifies more than 60% of clean images; triggered images keep
    their prediction. Here the given images are passed through these models, and the score is the share of images that
    are then predicted as one class.
    """

    name = "scaled-norms"
    title = "what images become when norms are scaled"
    needs = ("images",)
    explains = CONCENTRATION
    source = "the scaling is that of Hou et al., ICML 2024 (IBD-PSC); the statistic is ours"

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of passing each image with every number of norms that may be tried or chosen."""
        tried = max(1, len(norm_units(subject.model)) - MODELS)
        return Cost(predicted=(tried + MODELS) * len(subject.split))

    def measure(self, subject: Subject) -> Measured:
        """Scale the norms and count the predicted classes."""
        model, task = subject.model, subject.task
        count = min(MODELS, len(norm_units(model)))
        if not count:
            raise NotTested(f"{type(model).__name__} has no norms with a scale")
        defense = IBDPSC(factor=NORM_FACTOR, models=count, reserve=1)
        defense.check_model(model)
        split = Split(subject.split.images, subject.predicted)
        _, details = defense.prepare(task, split)
        norms = norms_in_order(task, split.images[:2])
        numbers = details["norms"]
        assert isinstance(numbers, list)
        after = []
        for number in numbers:
            with scaled(norms[-number:], NORM_FACTOR):
                after.append(classes_of(task.logits(model, split.images)))
        share, label = concentration(subject.predicted, after, subject.num_classes)
        reason = (
            f"{share:.0%} of the images of other classes become {subject.class_name(label)} "
            f"when the last {numbers[0]} to {numbers[-1]} norms are scaled by {NORM_FACTOR:g}"
        )
        return Measured(share, reason, {"class": label, "norms": numbers})


def concentration(before: Tensor, after: list[Tensor], classes: int) -> tuple[float, int]:
    """Find the class that most images of other classes are predicted as after a change.

    Args:
        before: (N,) int64, the predicted classes before the changes.
        after: The predicted classes (N,) after each change.
        classes: Number of classes.

    Returns:
        The share of the images of other classes that are predicted as this class, mean over the changes, in [0, 1]; and
        the class.
    """
    numbers = torch.arange(classes, device=before.device)
    others = before.unsqueeze(1) != numbers
    hits = torch.stack([((each.unsqueeze(1) == numbers) & others).double() for each in after]).mean(0).sum(0)
    shares = hits / others.sum(0).clamp(min=1)
    return shares.max().item(), int(shares.argmax())
