"""Trigger capture: do experts receive the patches that a trigger changed, and does the attack hang on it?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Mean, mean_of
from backdoorbench_moe.ops.metrics import Proportion, proportion
from backdoorbench_moe.ops.routing import blind_miss


@dataclass(frozen=True)
class LayerCapture:
    """Of the M triggered images that ASR counts: which experts receive a patch whose pixels the trigger changed.

    A patch stands for the tile of pixels it answers for; its receptive field may be wider. Proportions and
    `blind_*` shares are percent. "Blind" is what would be expected if each expert picked as many patches as it
    took of this image, each set of them equally likely, independent of the other experts (hypergeometric, for
    each image by its own number of changed patches, mean over the images).

    changed_patches: number of patches the trigger changed in an image. changed: (P,) in [0, 1], share of images
    in which it changed a patch. captured: images in which at least one expert receives a changed patch. experts:
    number of experts that do. by_expert: (E,) share in [0, 1] of images in which an expert does, and blind.
    asr: over all M, over those captured and those missed; None where there are none.
    """

    layer: str
    changed_patches: Mean
    changed: Tensor
    captured: Proportion
    blind_captured: float
    experts: Mean
    blind_experts: float
    by_expert: Tensor
    blind_by_expert: Tensor
    asr: Proportion
    asr_captured: Proportion | None
    asr_missed: Proportion | None


def layer_capture(layer: LayerPass, changed: Tensor, success: Tensor) -> LayerCapture:
    """Capture in one layer's pass over M triggered images.

    changed: (M, P) bool, patches the trigger changed. success: (M,) bool, called what the attacker wants.
    """
    receives = (layer.selected & changed.unsqueeze(1)).any(-1)
    captured = receives.any(1)
    miss = blind_miss(changed.sum(1), layer.selected.sum(-1), changed.shape[1])
    return LayerCapture(
        layer=layer.layer,
        changed_patches=mean_of(changed.sum(1)),
        changed=changed.double().mean(0),
        captured=proportion(int(captured.sum()), len(captured)),
        blind_captured=100 * (1 - miss.prod(1)).mean().item(),
        experts=mean_of(receives.sum(1)),
        blind_experts=(1 - miss).sum(1).mean().item(),
        by_expert=receives.double().mean(0),
        blind_by_expert=(1 - miss).mean(0),
        asr=proportion(int(success.sum()), len(success)),
        asr_captured=share(success[captured]),
        asr_missed=share(success[~captured]),
    )


def share(hits: Tensor) -> Proportion | None:
    """The proportion of true ones in (n,) bool; None of none."""
    return proportion(int(hits.sum()), len(hits)) if len(hits) else None
