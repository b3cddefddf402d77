"""Save the judgements of a defense in a run folder, and measure their accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.engine.measuring.evaluate import Metrics, detection_metrics
from backdoorbench_moe.engine.poisoning.triggered import Triggered
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.records import Judged, RunFolder


def save_judgements(judgements: Sequence[Judgement], folder: RunFolder) -> list[Judged]:
    """Convert judgements to the format of a record, and write arrays and scores of training samples to scores.npz.

    In scores.npz, judgement number j has the scores of training samples under "<j>/scores", (N,) float32, the indices
    of suspicious samples under "<j>/suspicious", (n,) int64, and other arrays under "<j>/<name>".
    """
    arrays: dict[str, np.ndarray] = {}
    judged = []
    for place, judgement in enumerate(judgements):
        scores, suspicious = judgement.scores, judgement.suspicious
        if isinstance(scores, Tensor):
            arrays[f"{place}/scores"] = scores.detach().float().cpu().numpy()
        if isinstance(suspicious, Tensor):
            arrays[f"{place}/suspicious"] = suspicious.detach().cpu().numpy()
        arrays |= {f"{place}/{name}": _array(values) for name, values in judgement.arrays.items()}
        judged.append(
            Judged(
                about=judgement.about,
                scores={k: float(v) for k, v in scores.items()} if isinstance(scores, Mapping) else None,
                threshold=None if judgement.threshold is None else float(judgement.threshold),
                suspicious=len(suspicious) if isinstance(suspicious, Tensor) else list(suspicious),
                reason=judgement.reason,
                details=dict(judgement.details),
            )
        )
    if arrays:
        folder.save_scores(arrays)
    return judged


def _array(values: Tensor) -> np.ndarray:
    """Convert a tensor to NumPy, which has no bfloat16."""
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def measure_class_judgements(
    judgements: Sequence[Judgement], triggered: Triggered | None, num_classes: int
) -> Metrics:
    """Measure the accuracy of the judgements about classes.

    The attacker's classes are those that triggered test images should be classified as: one, or all of them in an
    all-to-all attack. A class counts as flagged if any of the judgements flags it.

    Args:
        judgements: The judgements of a defense.
        triggered: The triggered test images; None for a clean run, for which every flagged class is a false positive.
        num_classes: Number of classes of the model.

    Returns:
        `class_tpr` and `class_fpr`: shares of the attacker's classes and of the other classes that are flagged. Shares
        of empty groups are left out. The result is empty if there is no judgement about classes.

    Raises:
        PluginError: A judgement names a class that does not exist.
    """
    about_classes = [each for each in judgements if each.about == "class"]
    if not about_classes:
        return {}
    names = [str(label) for label in range(num_classes)]
    flagged = {name for judgement in about_classes for name in judgement.suspicious}
    for name in sorted(flagged.difference(names)):
        raise PluginError(
            f"judgement about class: suspicious: expected numbers of classes, "
            f"'0' to '{num_classes - 1}', got {name!r}"
        )
    wanted = torch.zeros(num_classes, dtype=torch.bool)
    if triggered is not None:
        wanted[triggered.wanted.cpu()] = True
    return detection_metrics(torch.tensor([name in flagged for name in names]), wanted, prefix="class_")
