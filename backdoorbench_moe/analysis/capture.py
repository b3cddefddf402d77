"""Trigger capture: which experts receive the patches that a trigger changed, and whether capture predicts success."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoorbench_moe.analysis.passes import LayerPass
from backdoorbench_moe.ops.effects import Mean, mean_of
from backdoorbench_moe.ops.metrics import Proportion, proportion_of
from backdoorbench_moe.ops.routing import blind_miss


@dataclass(frozen=True)
class LayerCapture:
    """Trigger capture in one routed layer, over the M triggered images that count for ASR.

    An expert captures the trigger of an image if it receives at least one patch in which the trigger changed a
    pixel. An image is captured if any expert captures its trigger. A patch means the tile of pixels at its position,
    although its receptive field may be larger.

    The `blind_*` attributes are expected values under blind routing: the patches of each image are shuffled before they
    are routed. Each expert receives as many patches as before and shares as many with the other experts, but their
    positions are random. The values are computed exactly for each image (hypergeometric distribution) and averaged over
    the images. If every patch is routed to some expert, as in token-choice routing without dropped patches, every
    trigger is captured, and `captured` and `blind_captured` are both 100%.

    Attributes:
        layer: Name of the layer.
        changed_patches: Mean number of patches that the trigger changes in an image.
        changed: (P,) in [0, 1], share of images in which the trigger changes a patch.
        captured: Share of captured images, in percent.
        blind_captured: The same under blind routing, in percent.
        experts: Mean number of experts that capture the trigger of an image.
        blind_experts: The same under blind routing.
        by_expert: (E,) in [0, 1], share of images whose trigger an expert captures.
        blind_by_expert: (E,) in [0, 1], the same under blind routing.
        asr: ASR over all M images, in percent.
        asr_captured: ASR over the captured images, in percent; None if there are none.
        asr_missed: ASR over the images that are not captured, in percent; None if there are none.
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
    """Compute the capture in one layer.

    Args:
        layer: The layer's pass over the M triggered images.
        changed: (M, P) bool, patches that the trigger changed.
        success: (M,) bool, whether an image is predicted as the target class.
    """
    receives = (layer.selected & changed.unsqueeze(1)).any(-1)
    captured = receives.any(1)
    miss = blind_miss(changed.sum(1), layer.selected.sum(-1), changed.shape[1])
    all_miss = blind_miss(changed.sum(1), layer.selected.any(1).sum(-1, keepdim=True), changed.shape[1])
    return LayerCapture(
        layer=layer.layer,
        changed_patches=mean_of(changed.sum(1)),
        changed=changed.double().mean(0),
        captured=proportion_of(captured),
        blind_captured=100 * (1 - all_miss).mean().item(),
        experts=mean_of(receives.sum(1)),
        blind_experts=(1 - miss).sum(1).mean().item(),
        by_expert=receives.double().mean(0),
        blind_by_expert=(1 - miss).mean(0),
        asr=proportion_of(success),
        asr_captured=proportion_of(success[captured]) if captured.any() else None,
        asr_missed=None if captured.all() else proportion_of(success[~captured]),
    )
