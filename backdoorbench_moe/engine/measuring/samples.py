"""Measure a judgement about training images against the poison plan of the attack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.measuring.evaluate import Metrics, detection_metrics
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.records import Judged


def measure_samples(
    judgements: Sequence[Judgement], judged: Sequence[Judged], plan: PoisonPlan | None, images: int
) -> Metrics:
    """Measure the judgement about training images, if there is one, and add its counts to the record.

    Only images of the poison group are positives. Cover and noise images have their true labels, so they count as
    negatives.

    Args:
        judgements: The judgements of a defense.
        judged: The same judgements in the record.
        plan: The plan of the attack; None for a clean run.
        images: Number of training images N.

    Returns:
        `sample_tpr` and `sample_fpr`, the shares of poisoned and of other images that are suspicious; with scores also
        `sample_auroc`. Only `sample_fpr` for a clean run.

    Raises:
        PluginError: A score is missing or not finite, or an index of a suspicious image is out of range.
    """
    for judgement, entry in zip(judgements, judged, strict=True):
        if judgement.about == "sample":
            flagged, scores = _flagged(judgement, images), _scores(judgement, images)
            poison = _mask(images, None if plan is None else plan.indices)
            entry["counts"] = count_samples(flagged, poison)
            for name in ("cover", "noise"):
                if plan is not None and len(group := plan.groups[name]):
                    entry["counts"][name] = int(flagged[group].sum())
            return detection_metrics(flagged, poison, scores, prefix="sample_")
    return {}


def count_samples(flagged: Tensor, poison: Tensor) -> dict[str, int]:
    """Count correct and wrong judgements.

    Args:
        flagged: (N,) bool, the suspicious images.
        poison: (N,) bool, the poisoned images.

    Returns:
        "tp", "fn", "fp" and "tn". The sum of "tp" and "fn" is the number of poisoned images.
    """
    groups = {
        "tp": flagged & poison,
        "fn": ~flagged & poison,
        "fp": flagged & ~poison,
        "tn": ~flagged & ~poison,
    }
    return {name: int(group.sum()) for name, group in groups.items()}


def _flagged(judgement: Judgement, images: int) -> Tensor:
    names = torch.as_tensor(judgement.suspicious, dtype=torch.int64).cpu()
    if len(names) and not 0 <= int(names.min()) <= int(names.max()) < images:
        raise PluginError(
            f"judgement about sample: suspicious: expected indices in 0..{images - 1}, got {names.tolist()[:10]}"
        )
    return _mask(images, names)


def _mask(images: int, indices: Tensor | None) -> Tensor:
    mask = torch.zeros(images, dtype=torch.bool)
    if indices is not None:
        mask[indices] = True
    return mask


def _scores(judgement: Judgement, images: int) -> Tensor | None:
    scores = judgement.scores
    if scores is None:
        return None
    assert isinstance(scores, Tensor)
    if len(scores) != images or not scores.isfinite().all():
        raise PluginError(
            f"judgement about sample: scores: expected a finite score for each of {images} training images, "
            f"got {len(scores)}, {int(scores.isfinite().sum())} of them finite"
        )
    return scores.detach().cpu().double()
