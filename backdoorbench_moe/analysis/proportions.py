"""Shares of images with their confidence intervals."""

from __future__ import annotations

from torch import Tensor

from backdoorbench_moe.ops.metrics import Proportion, proportion


def share_of(hits: Tensor) -> Proportion:
    """Return the share of True in a bool tensor (n,), with its Wilson 95% interval. Raises ValueError if n is 0."""
    return proportion(int(hits.sum()), len(hits))
