"""Routing shift: how the trigger changes the routing of an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Mean, mean_of, means_of
from backdoorbench_moe.ops.routing import changed_share


@dataclass(frozen=True)
class LayerShift:
    """Routing shift in one routed layer, over the M test images that count for ASR.

    All values compare an image with its triggered version and are means over the images.

    Attributes:
        layer: Name of the layer.
        divergence: Jensen-Shannon divergence of the gates in nats, in [0, ln 2]. If the gates sum to 1 over the
            experts, it is the sum of one term for each expert; otherwise it is the mean over the experts.
        divergence_by_expert: The term, or the divergence, of each of the E experts.
        changed: Share of an expert's selected patches that change, |A xor B| / (|A| + |B|), in [0, 1], averaged
            over the experts.
        changed_by_expert: The share for each of the E experts.
    """

    layer: str
    divergence: Mean
    divergence_by_expert: tuple[Mean, ...]
    changed: Mean
    changed_by_expert: tuple[Mean, ...]


def layer_shift(clean: LayerPass, triggered: LayerPass, places: Tensor, divergence: Tensor) -> LayerShift:
    """Compute the shift in one layer.

    Args:
        clean: The layer's pass over the N clean test images.
        triggered: Its pass over the M triggered images.
        places: (M,) int64, indices of the triggered images among the clean ones.
        divergence: (M, E) float32, divergences in nats, see `PairedPass`.
    """
    changed = changed_share(clean.selected[places], triggered.selected)
    total = divergence.sum(1) if clean.gates_over == "experts" else divergence.mean(1)
    return LayerShift(
        layer=clean.layer,
        divergence=mean_of(total),
        divergence_by_expert=means_of(divergence),
        changed=mean_of(changed.mean(1)),
        changed_by_expert=means_of(changed),
    )
