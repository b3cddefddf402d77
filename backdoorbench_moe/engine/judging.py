"""Judgements of a defense as a run folder holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.records import Judged, RunFolder


def save_judgements(judgements: Sequence[Judgement], folder: RunFolder) -> list[Judged]:
    """Give judgements the form they have in a record; those of training samples go to scores.npz.

    In scores.npz, judgement number j has its scores under "<j>/scores", (N,) float32, and the indices of suspicious
    samples under "<j>/suspicious", (n,) int64.
    """
    arrays: dict[str, np.ndarray] = {}
    judged = []
    for place, judgement in enumerate(judgements):
        scores, suspicious = judgement.scores, judgement.suspicious
        if isinstance(scores, Tensor):
            arrays[f"{place}/scores"] = scores.detach().float().cpu().numpy()
        if isinstance(suspicious, Tensor):
            arrays[f"{place}/suspicious"] = suspicious.detach().cpu().numpy()
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
