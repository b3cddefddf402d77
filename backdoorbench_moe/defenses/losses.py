"""The loss of plain tuning, for defenses that change it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from backdoorbench_moe.moe.routed import Routing, auxiliary_loss


def training_loss(
    logits: Tensor, routing: Sequence[Routing], labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy plus the auxiliary losses of routed layers, which `Tune` minimises by default.

    Args:
        logits: (B, classes).
        routing: The routing of every routed layer.
        labels: (B,) int64.
        label_smoothing: Share of the target that is distributed equally over all classes, in [0, 1].

    Returns:
        A scalar.
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    return loss + auxiliary_loss(routing)
