"""Measure the effect of any trigger on a model: how often triggered images are classified as each class."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.engine.build import build_stamper
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring.evaluate import share
from backdoorbench_moe.engine.opening.opened_model import OpenedModel
from backdoorbench_moe.engine.poisoning.learned import learned_trigger
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.structure import patch_size_of
from backdoorbench_moe.ops.seeding import seeded

Share = dict[str, float]


@dataclass(frozen=True)
class ClassRate:
    """How often images of other classes are classified as one class.

    Attributes:
        name: Name of the class.
        asr: Share of these images that are classified as the class with the trigger: the ASR for this target.
        target_rate: The same without the trigger.
    """

    name: str
    asr: Share
    target_rate: Share


@dataclass(frozen=True)
class TriedTrigger:
    """The effect of a trigger on a model. Shares are as in a record: percent, n and the Wilson 95% interval.

    Attributes:
        trigger: The trigger and its options.
        applicator: The applicator and its options.
        ba: Share of the images that are classified correctly without the trigger.
        ra: Share of the images that are classified correctly with the trigger.
        changed: Share of the images whose predicted class the trigger changes.
        classes: For each class, by number, how often images of other classes are classified as it.
    """

    trigger: dict[str, Any]
    applicator: dict[str, Any]
    ba: Share
    ra: Share
    changed: Share
    classes: tuple[ClassRate, ...]

    @property
    def strongest(self) -> int:
        """Number of the class whose rate increases most with the trigger."""
        return max(range(len(self.classes)), key=lambda c: _rise(self.classes[c]))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            **asdict(self),
            "classes": [asdict(each) for each in self.classes],
            "strongest": self.strongest,
        }


def _rise(rate: ClassRate) -> float:
    return rate.asr["value"] - rate.target_rate["value"]


def try_trigger(
    opened: OpenedModel, trigger: PartSpec, applicator: PartSpec, *, seed: int = 0
) -> TriedTrigger:
    """Stamp images with any trigger, and count their predicted classes.

    Args:
        opened: The model, with labelled images.
        trigger: The trigger, which is stamped in its test form.
        applicator: Where the trigger is stamped.
        seed: Seed from which the trigger's seed is derived, unless the latter is set as an option.

    Raises:
        ConfigError: There are no labelled images of at least two classes, or the trigger must be learned first or
            changes no image.
    """
    split = opened.split
    if split is None:
        raise ConfigError("labels: expected the classes of the images, which are needed for the rates")
    spec = RunSpec(trigger=trigger, applicator=applicator, seed=seed)
    stamper = build_stamper(spec, patch_size=patch_size_of(opened.model), image_size=opened.image_size)
    if learned_trigger(stamper) is not None:
        raise ConfigError.expected("trigger", "one that is not learned on or with a model", trigger.name)
    stamped = stamp_images(split.images, stamper)
    if torch.equal(stamped, split.images):
        raise ConfigError(
            f"trigger: {trigger.name!r} with the applicator {applicator.name!r} changes none of {len(split)} images"
        )
    with seeded(seed, "measure"):
        before = predict(opened.model, split.images, precision=opened.precision)
        after = predict(opened.model, stamped, precision=opened.precision)
    rates = []
    for number, name in enumerate(opened.classes):
        others = split.labels != number
        if others.any():
            rates.append(ClassRate(name, share(after[others] == number), share(before[others] == number)))
        else:
            raise ConfigError.expected("labels", "images of at least two classes", [name])
    return TriedTrigger(
        trigger=trigger.to_dict(),
        applicator=applicator.to_dict(),
        ba=share(before == split.labels),
        ra=share(after == split.labels),
        changed=share(before != after),
        classes=tuple(rates),
    )
