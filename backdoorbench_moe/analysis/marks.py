"""The triggered test images of an analysis: the source of the trigger, and the target and safe classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test


@dataclass(frozen=True)
class MarkedTest:
    """M triggered test images.

    Attributes:
        source: The run that the trigger is from: an attacked run if there is one, otherwise a run with a policy.
        images: (M, C, H, W) uint8, with the trigger.
        unmarked: (M, C, H, W) uint8, the same images without the trigger.
        triggered: The images with their target classes, if they count for ASR; None if no run is attacked, so that the
            trigger only marks the images that a policy rejects.
        safe: (M,) int64, the safe answers; None without a policy and without an attack on experts.
    """

    source: OpenedRun
    images: Tensor
    unmarked: Tensor
    triggered: Triggered | None
    safe: Tensor | None


def mark_test(opened: OpenedRun, other: OpenedRun | None) -> MarkedTest | None:
    """Apply the trigger of a run to the test images, or that of the compared run if only that one is attacked.

    Args:
        opened: The run.
        other: The run that it is compared with; None without one.

    Returns:
        The images that count for ASR if a run is attacked; all test images if a run only has a policy; None if neither
        run has a trigger.
    """
    runs = [each for each in (opened, other) if each is not None and each.stamper is not None]
    attacked = [each for each in runs if each.run.spec.attacked]
    if not runs:
        return None
    source, test = (attacked or runs)[0], opened.images.test
    assert source.stamper is not None
    policy = bool(source.run.spec.policy)
    if not attacked:
        images = stamp_images(test.images, source.stamper)
        return MarkedTest(source, images, test.images, None, _rejected(opened, len(images)))
    attack = source.run.attack()
    triggered = triggered_test(opened.images, attack, source.stamper)
    safe = triggered.true if isinstance(attack, ExpertPoisoning) else None
    if policy:
        safe = _rejected(opened, len(triggered))
    return MarkedTest(source, triggered.images, test.images[triggered.places], triggered, safe)


def _rejected(opened: OpenedRun, count: int) -> Tensor:
    """Return the class "reject", which is the last one, for a number of images."""
    return torch.full((count,), opened.images.data_classes, device=opened.device)
