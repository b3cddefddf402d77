"""What a run is made of, built from its spec and checked against the data."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from backdoorbench_moe.attacks.base import PoisonPlan
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.counting import count
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.build import (
    build_attack,
    build_model,
    build_stamper,
    describe,
    model_patch_size,
)
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.engine.triggered import Triggered, triggered_test
from backdoorbench_moe.errors import BbmoeWarning, ConfigError

# Images on which the trigger is tried.
VISIBLE_ON = 64


class Setup:
    """Model, attack, trigger and poison plan of one run; each is built once.

    Args:
        spec: The run's spec.
        images: The data, on the device.

    Attributes:
        model: The model, its weights drawn from the run's seed.
        attack: Who the attacker is; None for a clean run.
        stamper: Trigger and applicator; None for a run without a trigger.
        plan: Which training images the attacker changes; None for a clean run.

    Raises:
        BbmoeError: Parts that do not fit the data or each other.
    """

    def __init__(self, spec: RunSpec, images: ImageSet) -> None:
        self.spec, self.images = spec, images
        attack = build_attack(spec) if spec.attacked else None
        if attack is not None:
            attack.check(images.num_classes)
        self.model = build_model(spec, num_classes=images.num_classes, image_size=images.image_size)
        self.attack, self.stamper, self.plan = attack, None, None
        self._triggered: Triggered | None = None
        if attack is not None:
            if attack.uses_trigger:
                size = model_patch_size(self.model)
                self.stamper = build_stamper(spec, patch_size=size, image_size=images.image_size)
                self._check_visible()
            self.plan = attack(images.train.labels, num_classes=images.num_classes, seed=spec.seed)
            self._check_noise(self.plan)
            attack.counted(images.test.labels, images.num_classes)

    def _check_noise(self, plan: PoisonPlan) -> None:
        if len(plan.noise) and (self.stamper is None or not self.stamper.trigger.has_noise):
            name = (
                "a run without a trigger"
                if self.spec.trigger is None
                else f"the trigger {self.spec.trigger.name!r}"
            )
            raise ConfigError(f"poison.noise: {name} has no noise form")

    def _check_visible(self) -> None:
        """Warn if the trigger changes nothing, as a warp of tiles of one pixel does."""
        assert self.stamper is not None and self.spec.trigger is not None and self.spec.applicator is not None
        images = self.images.test.images[:VISIBLE_ON]
        if torch.equal(stamp_images(images, self.stamper), images):
            warnings.warn(
                f"trigger: {self.spec.trigger.name!r} with the applicator {self.spec.applicator.name!r} changes none "
                f"of {count(len(images), 'test image')}",
                BbmoeWarning,
                stacklevel=2,
            )

    def triggered_test(self) -> Triggered | None:
        """The test images that count for ASR, triggered; None for a clean run. They are stamped once."""
        if self._triggered is None and self.attack is not None:
            self._triggered = triggered_test(self.images, self.attack, self.stamper)
        return self._triggered

    def describe_parts(self) -> dict[str, Any]:
        """Return the values that the options of model, attack, trigger and applicator took, for the record."""
        parts = {"model": describe(self.model)}
        # Also where the class holds it, since `Run.stamper` builds the applicator from this.
        if (size := model_patch_size(self.model)) is not None:
            parts["model"]["patch_size"] = size
        if self.attack is not None and (options := describe(self.attack)):
            parts["attack"] = options
        if self.stamper is not None:
            parts["trigger"] = describe(self.stamper.trigger)
            parts["applicator"] = describe(self.stamper.applicator)
        return parts

    def describe_poison(self) -> dict[str, Any] | None:
        """How many images the attacker changes, for the record; None for a clean run."""
        if self.plan is None:
            return None
        poison = self.spec.poison
        values = {"rate": poison.rate, "n": len(self.plan.indices), "target": poison.target}
        extra = {"cover": len(self.plan.cover), "noise": len(self.plan.noise)}
        return values | {group: count for group, count in extra.items() if count}
