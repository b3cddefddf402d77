"""Routing shift: how the routing of an image changes when the trigger is stamped on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Mean, mean_of, means_of
from backdoorbench_moe.ops.routing import changed_share


@dataclass(frozen=True)
class LayerShift:
    """The M test images that ASR counts, each against its triggered version.

    divergence: Jensen-Shannon divergence of the gates in nats, 0 to ln 2; of gates over the patches the mean
    over the experts, of gates over the experts their sum. changed: share in [0, 1] of the selected patches
    that change, |A xor B| / (|A| + |B|), mean over the experts. by_expert: E of each. All are means over images.
    """

    layer: str
    divergence: Mean
    divergence_by_expert: tuple[Mean, ...]
    changed: Mean
    changed_by_expert: tuple[Mean, ...]


def layer_shift(clean: LayerPass, triggered: LayerPass, places: Tensor, divergence: Tensor) -> LayerShift:
    """Shift in one layer. places: (M,) of the triggered images among the clean ones. divergence: (M, E)."""
    changed = changed_share(clean.selected[places], triggered.selected)
    total = divergence.sum(1) if clean.gates_over == "experts" else divergence.mean(1)
    return LayerShift(
        layer=clean.layer,
        divergence=mean_of(total),
        divergence_by_expert=means_of(divergence),
        changed=mean_of(changed.mean(1)),
        changed_by_expert=means_of(changed),
    )
