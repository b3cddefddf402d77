"""Checks of the largest margin of a class: over all possible images, and with a perturbation of the given images."""

from __future__ import annotations

import math
from statistics import median
from typing import ClassVar

import torch
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backdoorbench_moe.analysis.document import encode_picture
from backdoorbench_moe.auditing.check import FEWEST_CLASSES, Check, Measured, NotTested
from backdoorbench_moe.auditing.siblings import find_standout, surprise_of
from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.inversion import PIXELS_AT_ONCE
from backdoorbench_moe.defenses.stamps import (
    ApplicatorName,
    add_pattern,
    canvas_shape,
    canvas_side,
    stamp_all,
)
from backdoorbench_moe.moe.temporary import frozen
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.outliers import studentised
from backdoorbench_moe.ops.seeding import generator

SURPRISE = (
    "-log10 of the probability that the margin of one class would be so much larger than those of the others by "
    "chance, corrected for the number of classes: 2 is a probability of 1%"
)
SURPRISING = 2.0
# The search for images with large margins: number of images for each class, steps of Adam, and learning rate.
STARTS, STEPS, STEP_SIZE = 8, 60, 0.05
# Largest change of a pixel by a perturbation, as a share of its range.
STRENGTH = 0.1
# The search for perturbations: number of images, batch size, and limits of the number of steps, fewer for many classes.
IMAGES, BATCH, MOST_STEPS, FEWEST_STEPS, BUDGET = 100, 16, 30, 10, 40_000


class LargestMargin(Check):
    """Whether the largest margin of one class, over all possible images, is much larger than those of the others.

    The margin of a class is its logit minus the largest other logit. For each class, images of noise are optimized for
    the largest margin. The training images of the target class contain the trigger more often than any other feature,
    so that it can cause a margin that no feature causes for another class. No images of the data are needed.

    Departure: the search has a fixed length, `STEPS` steps of Adam from `STARTS` starts, and the margins are compared
    by a t test of their logarithms.
    """

    name = "largest-margin"
    title = "classes that can win by far"
    explains = SURPRISE
    threshold = SURPRISING
    source = "Wang et al., IEEE S&P 2024 (MM-BD)"

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of the search for all classes."""
        return Cost() if subject.image_size is None else Cost(trained=STARTS * STEPS * subject.num_classes)

    def measure(self, subject: Subject) -> Measured:
        """Search for the images and compare the margins of the classes."""
        side = subject.image_size
        if side is None:
            raise NotTested("the size of its images is not known")
        if subject.num_classes < FEWEST_CLASSES:
            raise NotTested(f"with {subject.num_classes} classes, none can be an outlier")
        margins = largest_margins(subject, side)
        _check_finite(margins)
        values = margins.clamp(min=1e-6).tolist()  # Only positive values can be compared by their ratio.
        outlier, by_class = find_standout(
            {"margin": {str(c): value for c, value in enumerate(values)}}, direction="up"
        )
        label = int(outlier.name) if outlier.surprise else int(margins.argmax())
        reason = (
            f"{subject.class_name(label)} can win by {margins[label]:.3g}; "
            f"the median of all classes is {median(margins.tolist()):.3g}"
        )
        details = {"class": label, "margins": margins.tolist(), "surprises": by_class}
        return Measured(outlier.surprise, reason, details)


def largest_margins(subject: Subject, side: int) -> Tensor:
    """Search for images (side x side) with the largest margin of each class.

    The search starts from the same noise for all classes.

    Returns:
        (classes,) float32, the largest margin of each class.
    """
    noise = torch.rand(STARTS, 3, side, side, generator=generator(subject.seed, "largest margin"))
    noise = noise.to(subject.device)
    at_once = max(1, PIXELS_AT_ONCE // noise[:, 0].numel())
    with frozen(subject.model.parameters()):
        groups = torch.arange(subject.num_classes, device=subject.device).split(at_once)
        return torch.cat([_largest_of(subject.model, noise, group) for group in groups])


def _largest_of(model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    """Return the largest margin (K,) of each of K classes, in a search from noise images (STARTS, 3, S, S)."""
    images = noise.repeat(len(labels), 1, 1, 1).requires_grad_()
    target = labels.repeat_interleave(len(noise))
    optimizer = torch.optim.Adam([images], lr=STEP_SIZE)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        (-margins_of(model(images), target).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    with torch.no_grad():
        return margins_of(model(images), target).view(len(labels), -1).amax(1).float()


def _check_finite(margins: Tensor) -> None:
    """Raise NotTested if a margin is NaN or infinite, as for a class that the model masks."""
    if not torch.isfinite(margins).all():
        raise NotTested("the logits of some class are not finite numbers")


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margins of classes: the logit of the class minus the largest other logit.

    Args:
        logits: (N, classes).
        labels: (N,) int64, the classes.

    Returns:
        (N,), negative if another class has a larger logit.
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return own - logits.scatter(1, labels.unsqueeze(1), -math.inf).amax(1)


class Universal(Check):
    """Whether a small perturbation of all images gives one class a much larger margin than any other class.

    For each class, a perturbation of at most `STRENGTH` that is added to all images is optimized. The mean margin of
    the class in images of other classes is compared. Unlike a stamp with a mask, this finds triggers that change all
    pixels a little. The search uses a fixed number of images, so that it takes equally long with and without a trigger.

    Source:
        The idea of comparing what additive perturbations reach, class by class: Xiang, Miller and Kesidis, "Detection
        of Backdoors in Trained Classifiers Without Access to the Training Set", IEEE TNNLS 2020. There their size is
        compared; here it is fixed, and margins are compared.
    """

    needs = ("images", "classes")
    threshold = SURPRISING
    explains = SURPRISE
    source = "after Xiang et al., IEEE TNNLS 2020; the statistic is ours"
    applicator: ClassVar[ApplicatorName]
    where: ClassVar[str]

    def cost(self, subject: Subject) -> Cost:
        """Return the cost of the search for all classes, and of applying the results to the images."""
        classes, images = subject.num_classes, min(IMAGES, len(subject.split))
        return Cost(trained=steps(classes) * BATCH * classes, predicted=images * classes)

    def measure(self, subject: Subject) -> Measured:
        """Search for the perturbations and compare the margins of the classes."""
        classes = subject.num_classes
        images, predicted = as_input(subject.split.images[:IMAGES]), subject.predicted[:IMAGES]
        side = canvas_side(self.applicator, None, subject.model, images.shape[-1])
        at_once = max(1, PIXELS_AT_ONCE // (BATCH * images[0, 0].numel()))
        with frozen(subject.model.parameters()):
            groups = torch.arange(classes, device=images.device).split(at_once)
            found = [_perturb(subject, images, predicted, group, side) for group in groups]
        patterns, margins = (torch.cat(each) for each in zip(*found, strict=True))
        _check_finite(margins)
        z = studentised(margins.cpu())
        label = int(z.argmax())
        surprise = surprise_of(float(norm.sf(z[label])), classes)
        middle = median(margins.tolist())
        reason = (
            f"{subject.class_name(label)}: a perturbation of at most {STRENGTH:.0%} {self.where} makes it win by "
            f"{margins[label]:.3g} in images of other classes; the median of all classes is {middle:.3g}"
        )
        details = {
            "class": label,
            "margins": margins.tolist(),
            "deviations": z.tolist(),
            "picture": encode_picture(drawn(patterns[label])),
        }
        return Measured(surprise, reason, details)


class UniversalImage(Universal):
    """A perturbation of the image."""

    name = "universal-image"
    title = "classes that win with a small change of the image"
    applicator = "image"
    where = "of the image"


class UniversalPatch(Universal):
    """One perturbation of all tiles, the form of the triggers of BadPatches."""

    name = "universal-patch"
    title = "classes that win with a small change of all tiles"
    applicator = "patch"
    where = "of all tiles"


def steps(classes: int) -> int:
    """Return the number of steps of the search for perturbations."""
    return max(FEWEST_STEPS, min(MOST_STEPS, BUDGET // (BATCH * classes)))


def drawn(pattern: Tensor) -> Tensor:
    """Convert a perturbation (3, h, w) to an image (3, h, w) uint8, in which unchanged pixels are grey."""
    return (pattern / (2 * STRENGTH) + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def _perturb(
    subject: Subject, images: Tensor, predicted: Tensor, labels: Tensor, side: int | None
) -> tuple[Tensor, Tensor]:
    """Search for the perturbations of some classes.

    Args:
        subject: The subject.
        images: (N, 3, S, S) in [0, 1].
        predicted: (N,) int64, their predicted classes.
        labels: (K,) int64, the classes.
        side: Side of the tiles in pixels; None for perturbations of the whole image.

    Returns:
        The perturbations (K, 3, h, w), and the mean margins (K,) of the classes in perturbed images of other classes.
    """
    model = subject.model
    patterns = torch.zeros(len(labels), 3, *canvas_shape(images, side), device=images.device).requires_grad_()
    optimizer = torch.optim.Adam([patterns], lr=STRENGTH / 5)
    for step in range(steps(subject.num_classes)):
        order = torch.randperm(len(images), generator=generator(subject.seed, "universal", step))
        rows = order[:BATCH].to(images.device)
        logits = model(stamp_all(add_pattern, images[rows], patterns, side).flatten(0, 1))
        target, others = labels.repeat_interleave(len(rows)), labels.unsqueeze(1) != predicted[rows]
        losses = cross_entropy(logits, target, reduction="none").view_as(others)
        optimizer.zero_grad(set_to_none=True)
        (losses * others).sum().backward()
        optimizer.step()
        with torch.no_grad():
            patterns.clamp_(-STRENGTH, STRENGTH)
    found = patterns.detach()
    return found, torch.stack(
        [_mean_margin(model, images, predicted, p, c, side) for p, c in zip(found, labels, strict=True)]
    )


@torch.no_grad()
def _mean_margin(
    model: nn.Module, images: Tensor, predicted: Tensor, pattern: Tensor, label: Tensor, side: int | None
) -> Tensor:
    """Return the mean margin of a class in images of other classes with a perturbation (3, h, w)."""
    rows = images[predicted != label]
    if not len(rows):
        raise NotTested("all images are predicted as one class")
    logits = model(stamp_all(add_pattern, rows, pattern.unsqueeze(0), side)[0])
    return margins_of(logits, label.expand(len(rows))).float().mean()
