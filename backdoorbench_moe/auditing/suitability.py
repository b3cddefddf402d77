"""Whether the given images suit the audited model."""

from __future__ import annotations

import math

from backdoorbench_moe.auditing.subject import Subject
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.moe.norms import batch_norms, input_moments
from backdoorbench_moe.ops.metrics import near_chance

# Share of the images in one predicted class from which images without labels are doubted.
MOST_IN_ONE_CLASS = 0.9
# Ratio of variances from which they are doubted. For 136 models trained on CIFAR-10 (pMoE and WideResNet, 16 triggers,
# some defended), it is at most 1.19 for 20 test images and 1.10 for 500; at least 1.25 for noise and 1.27 for half the
# contrast; and 1.10 to 1.66 for a 3x3 box blur, which is not always noticed (`benchmarks/suitability.py`).
LARGEST_RATIO = 1.22
# Number of values of a channel, such as 20 images of 7x7.
FEWEST_VALUES = 900


def doubt_of(subject: Subject) -> str:
    """Return why the images may not suit the model, in one sentence; "" if nothing indicates it.

    Images are doubted if

    - the accuracy is near chance or, without labels, nearly all images are predicted as one class;
    - the inputs of the model's batch norms have other variances than in training, which is also possible if the model
      was trained with strong augmentation, or fine-tuned with frozen norms.
    """
    if subject.images is None:
        return ""
    found = _labels_doubt(subject) if subject.known_labels is not None else _class_doubt(subject)
    found = found or _norms_doubt(subject)
    return f"The images may not suit the model: {found}. If so, the verdict means nothing." if found else ""


def _labels_doubt(subject: Subject) -> str:
    labels, predicted = subject.known_labels, subject.predicted
    assert labels is not None
    # Not that of the most frequent label, as all labels may be of one class.
    if not near_chance(int((predicted == labels).sum()), len(labels), 1 / subject.num_classes):
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
    return f"the inputs of its batch norms have other variances than in training, typically by a factor of {ratio:.1f}"


def variance_ratio(subject: Subject) -> float | None:
    """Compare the inputs of the batch norms with their running statistics.

    Returns:
        The ratio of the larger to the smaller variance of a channel, at least 1: the median over the channels of a
        norm, which ignores pruned channels, and then the median over the norms. Norms with fewer than `FEWEST_VALUES`
        values of a channel are left out, since their variances are uncertain. None if no norm is left, or without
        images.
    """
    norms, images = list(batch_norms(subject.model).values()), subject.images
    if not norms or images is None:
        return None
    try:
        found = input_moments(norms, lambda: logits(subject.model, images, precision=subject.precision))
    except ValueError:
        return None  # A norm receives a single value.
    ratios = []
    for norm in norms:
        if norm not in found or found[norm][2] < FEWEST_VALUES or norm.running_var is None:
            continue
        own, stored = found[norm][1] + norm.eps, norm.running_var.double() + norm.eps
        ratios.append((own / stored).log().abs().median().item())
    return math.exp(sorted(ratios)[len(ratios) // 2]) if ratios else None
