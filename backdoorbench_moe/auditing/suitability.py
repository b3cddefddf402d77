"""Whether the given images suit the audited model."""

from __future__ import annotations

import math

from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.moe.norms import batch_norms, input_moments
from backdoorbench_moe.ops.metrics import near_chance

# Share of the images in one predicted class from which images without labels are doubted.
MOST_IN_ONE_CLASS = 0.9
# Ratio of variances from which they are doubted. For 42 models trained on CIFAR-10 (pMoE and WideResNet, 13 triggers),
# it is at most 1.16 for 20 test images and 1.09 for 500, and at least 1.38 for noise, 1.33 for half the contrast and
# 1.39 for a 3x3 box blur.
LARGEST_RATIO = 1.3
SMALLEST = 1e-12


def doubt_of(subject: Subject) -> str:
    """Return why the images may not suit the model, in one sentence; "" if nothing indicates it.

    Images are doubted if

    - the accuracy is near chance or, without labels, nearly all images are predicted as one class;
    - the inputs of the model's batch norms have other variances than in training, which is also possible if the model
      was trained with strong augmentation.
    """
    if subject.images is None:
        return ""
    found = _labels_doubt(subject) if subject.known_labels is not None else _class_doubt(subject)
    found = found or _norms_doubt(subject)
    return f"The images may not suit the model: {found}. If so, the verdict means nothing." if found else ""


def _labels_doubt(subject: Subject) -> str:
    labels, predicted = subject.known_labels, subject.predicted
    assert labels is not None
    chance = int(labels.bincount().max()) / len(labels)
    if not near_chance(int((predicted == labels).sum()), len(labels), chance):
        return ""
    return f"the accuracy on them, {subject.accuracy:.0f}%, is near chance"


def _class_doubt(subject: Subject) -> str:
    count, label = subject.predicted.bincount().max(0)
    total = len(subject.predicted)
    if count <= MOST_IN_ONE_CLASS * total:
        return ""
    return f"{count} of {total} are predicted as {subject.class_name(int(label))}"


def _norms_doubt(subject: Subject) -> str:
    ratio = variance_ratio(subject)
    if ratio is None or ratio <= LARGEST_RATIO:
        return ""
    return f"the inputs of its batch norms have other variances than in training, by a factor of {ratio:.1f} on average"


def variance_ratio(subject: Subject) -> float | None:
    """Compare the inputs of the batch norms with their running statistics.

    Returns:
        The ratio of the larger to the smaller variance of a channel, at least 1: the geometric mean over the channels
        of a norm, and the median over the norms. None for a model without batch norms, or without images.
    """
    norms = list(batch_norms(subject.model).values())
    if not norms or subject.images is None:
        return None
    images = subject.images
    found = input_moments(norms, lambda: logits(subject.model, images, precision=subject.precision))
    ratios = []
    for norm in norms:
        if norm in found and norm.running_var is not None:
            own = found[norm][1].clamp(min=SMALLEST)
            stored = norm.running_var.double().clamp(min=SMALLEST)
            ratios.append((own / stored).log().abs().mean().item())
    return math.exp(sorted(ratios)[len(ratios) // 2]) if ratios else None
