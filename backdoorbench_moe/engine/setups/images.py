"""The setup of a run on images, built from its spec and checked against the data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, HarmfulQueries
from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.build import (
    build_attack,
    build_model,
    build_stamper,
    check_trigger,
    cut,
    describe,
    model_patch_size,
)
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring.evaluate import marked_metrics, measure, share
from backdoorbench_moe.engine.measuring.mixtures import (
    gate_shares,
    mixture_pass,
    share_metrics,
    task_metrics,
)
from backdoorbench_moe.engine.poisoning.learned import learned_trigger
from backdoorbench_moe.engine.poisoning.poison import stamp_images, stamp_places
from backdoorbench_moe.engine.poisoning.policy import changed_pixels, policy_count, with_marked, with_reject
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test
from backdoorbench_moe.engine.setups.base import Measured, Setup
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.errors import BbmoeWarning, ConfigError
from backdoorbench_moe.ops.images import concatenate
from backdoorbench_moe.ops.metrics import chance_rate
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.triggers.stored import StoredTrigger
from backdoorbench_moe.triggers.trainable import TrainableTrigger
from backdoorbench_moe.wording.counting import count

# Number of images on which the visibility of the trigger is checked.
VISIBLE_ON = 64


class ImageSetup(Setup):
    """Model, attack, trigger and poison plan of one run on images.

    Args:
        spec: The run's spec.
        images: The data, on the device.

    Raises:
        BbmoeError: Parts are incompatible with the data or each other.
    """

    def __init__(self, spec: RunSpec, images: ImageSet) -> None:
        super().__init__(spec, with_reject(images) if spec.policy else images)
        _check_parts(spec)
        attack = build_attack(spec) if spec.attacked else None
        if attack is not None:
            check_trigger(spec, attack)
            attack.check(images.data_classes)
            _check_mixture(spec, attack)
        self.model = build_model(spec, self.images.model_options)
        self.attack = attack
        self.tasks = None if spec.mixture is None else Tasks(spec, images)
        self._triggered: Triggered | None = None
        self._marked: Tensor | None = None
        self._test: Split | None = None
        if spec.policy or (attack is not None and attack.uses_trigger):
            size = model_patch_size(self.model)
            self.stamper = build_stamper(spec, patch_size=size, image_size=images.image_size)
            self._check_learned()
            if isinstance(self.stamper.trigger, StoredTrigger):
                self._check_uses_of_stored()
            elif not spec.defenses:  # Otherwise it was checked for the attacked run.
                self._check_visible()
        if spec.policy:
            policy_count(len(images.train), spec.policy)
            if self.tasks is not None and spec.mixture is not None and (rate := spec.mixture.expert_policy):
                for task in self.tasks.facts:
                    policy_count(task["train_images"], rate, "mixture.expert_policy")
        if attack is not None:
            self.plan = attack(images.train.labels, num_classes=images.data_classes, seed=spec.seed)
            self._check_noise(self.plan)
            self._check_stored(attack.counted(images.test.labels, images.data_classes))

    @property
    def reject(self) -> int:
        """Number of the class "reject" in a run with a policy."""
        assert self.spec.policy
        return self.images.data_classes

    def _check_noise(self, plan: PoisonPlan) -> None:
        if len(plan.noise) and (self.stamper is None or not self.stamper.trigger.has_noise):
            name = (
                "a run without a trigger"
                if self.spec.trigger is None
                else f"the trigger {self.spec.trigger.name!r}"
            )
            raise ConfigError(f"poison.noise: {name} has no noise form")

    def _check_learned(self) -> None:
        """Check that a learned trigger is compatible with the attack.

        Raises:
            ConfigError: The trigger is the mark of a policy or of harmful queries; or it is trained with the model, but
                the attacker does not control the training; or the attacker does, but the trigger is optimised on a
                surrogate.
        """
        trigger = learned_trigger(self.stamper)
        if trigger is None:
            return
        assert self.spec.trigger is not None
        name = self.spec.trigger.name
        if self.spec.policy or isinstance(self.attack, ExpertPoisoning):
            raise ConfigError.expected("trigger", "one that is not learned, as the mark of images", name)
        assert self.spec.attack is not None
        trainable, controlled = (
            isinstance(trigger, TrainableTrigger),
            isinstance(self.attack, TrainingControl),
        )
        if trainable and not controlled:
            expected = f"training-control, as the trigger {name!r} is trained with the model"
            raise ConfigError.expected("attack", expected, self.spec.attack.name)
        if controlled and not trainable:
            expected = "one that is not optimised on a surrogate, where the attacker trains the model"
            raise ConfigError.expected("trigger", expected, name)

    def _check_uses_of_stored(self) -> None:
        """Check that a trigger with stored images stamps complete images of a fixed plan only.

        It does not change any others: tiles, marked training images, and images that are poisoned in every batch, which
        are stamped with random places.

        Raises:
            ConfigError: Others would be stamped, too.
        """
        assert self.stamper is not None and self.spec.trigger is not None and self.spec.applicator is not None
        name, image = self.spec.trigger.name, self.images.test.images[:1] / 255
        if self.spec.policy or isinstance(self.attack, ExpertPoisoning):
            raise ConfigError.expected("trigger", "one that can stamp any image, as the mark of images", name)
        if isinstance(self.attack, TrainingControl):
            expected = "one that can stamp any image, where batches are poisoned"
            raise ConfigError.expected("trigger", expected, name)
        if cut(self.stamper.applicator, image).shape != image.shape:
            expected = f"one that stamps the complete image, for the trigger {name!r}"
            raise ConfigError.expected("applicator", expected, self.spec.applicator.name)

    def _check_stored(self, counted: Tensor) -> None:
        """Check that a trigger with stored images contains all images that the attack stamps.

        Args:
            counted: (N,) bool, the test images that count for ASR.

        Raises:
            ConfigError: An image is missing.
        """
        if self.stamper is None or not isinstance(trigger := self.stamper.trigger, StoredTrigger):
            return
        assert self.plan is not None
        test = self.images.test.images[counted]
        found = {
            "test": (trigger.missing(test), len(test)),
            "training": (
                trigger.missing_places(torch.cat(list(self.plan.groups.values()))),
                sum(map(len, self.plan.groups.values())),
            ),
        }
        for split, (missing, stamped) in found.items():
            if missing:
                raise ConfigError(
                    f"trigger.file: expected stored versions of the {stamped} {split} images that the attack stamps, "
                    f"but {missing} are missing"
                )

    def _check_visible(self) -> None:
        """Check on some test images that the test and training forms of the trigger change 8-bit images.

        Warns if fewer than half of the images change, such as dark images under a black square.

        Raises:
            ConfigError: No image changes, such as with a warp of tiles of one pixel.
        """
        assert self.stamper is not None
        images = self.images.test.images[:VISIBLE_ON]
        places = torch.arange(len(images), device=images.device)
        test = stamp_images(images, self.stamper)
        self._check_changed(_count_changed(images, test), len(images))
        if not self.spec.policy:
            training = stamp_places(images, places, self.stamper.training)
            if not torch.equal(training, test):
                self._check_changed(_count_changed(images, training), len(images), " in its training form")

    def _check_changed(self, changed: int, images: int, form: str = "") -> None:
        """Raise ConfigError if a form of the trigger changes none of the test images, or warn if fewer than half."""
        assert self.spec.trigger is not None and self.spec.applicator is not None
        if 2 * changed >= images:
            return
        message = (
            f"trigger: {self.spec.trigger.name!r}{form} with the applicator {self.spec.applicator.name!r} changes "
            f"{changed or 'none'} of {count(images, 'test image')}"
        )
        if changed:
            warnings.warn(f"{message}; the others are unchanged", BbmoeWarning, stacklevel=2)
            return
        if self.spec.policy:
            raise ConfigError(f"{message}, so it cannot be the mark of images to reject")
        if isinstance(self.attack, ExpertPoisoning):
            raise ConfigError(f"{message}, so it cannot be the mark of harmful queries")
        side = self.images.image_size
        raise ConfigError(f"{message}: at {side}x{side} pixels it cannot be distinguished from the image")

    def triggered_test(self) -> Triggered | None:
        """The triggered test images that count for ASR, cached; None for a clean run."""
        if self._triggered is None and self.attack is not None:
            self._triggered = triggered_test(self.images, self.attack, self.stamper)
        return self._triggered

    @property
    def test(self) -> Split:
        """The clean test images; for a run with tasks, those of all its tasks."""
        if self.tasks is None:
            return self.images.test
        if self._test is None:
            self._test = concatenate(self.tasks.tests())
        return self._test

    def test_labels(self) -> Tensor:
        """The labels of the clean test images; for a run with tasks, those of all its tasks."""
        if self.tasks is None:
            return self.images.test.labels
        return torch.cat([split.labels for split in self.tasks.tests()])

    def with_policy(self, split: Split, rate: float) -> Split:
        """Add marked images to training images, if there is a policy; see `policy.with_marked`.

        Args:
            split: The training images.
            rate: Number of marked images to add, as a share of the size of `split`; 0 for none.
        """
        if not self.spec.policy or not rate:
            return split
        assert self.stamper is not None
        seed = self.spec.seed
        return with_marked(split, self.images.train, self.stamper, rate=rate, reject=self.reject, seed=seed)

    def marked_test(self) -> Tensor | None:
        """Marked test images, (M, C, H, W) uint8; None for a run without an attack or a policy.

        For an attacked run, these are the triggered images that count for ASR.
        """
        if (triggered := self.triggered_test()) is not None:
            return triggered.images
        if not self.spec.policy:
            return None
        assert self.stamper is not None
        if self._marked is None:
            self._marked = stamp_images(self.images.test.images, self.stamper)
        return self._marked

    def safe_answers(self) -> Tensor | None:
        """The safe answers to the images of `triggered_test`, (M,) int64; None unless the attack is on experts.

        With a policy, the safe answer is "reject"; otherwise, it is the true label.
        """
        if (triggered := self.triggered_test()) is None or not isinstance(self.attack, ExpertPoisoning):
            return None
        return torch.full_like(triggered.true, self.reject) if self.spec.policy else triggered.true

    def harmful_queries(self) -> HarmfulQueries:
        """The marked training images that would count for ASR, with the harmful and the safe answers."""
        train, classes = self.images.train, self.images.data_classes
        assert self.stamper is not None and self.attack is not None
        places = self.attack.counted(train.labels, classes).nonzero().squeeze(1)
        images, true = train.images[places], train.labels[places]
        marked = stamp_images(images, self.stamper)
        safe = true.new_full(true.shape, self.reject) if self.spec.policy else true
        wanted = self.attack.wanted(train.labels, classes)[places]
        return HarmfulQueries(Split(marked, wanted), Split(marked, safe), changed_pixels(images, marked))

    def defenders_queries(self, count: int, seed: int) -> tuple[Split, None]:
        """Training images with the mark of the policy and the label "reject"."""
        train = self.images.train
        assert self.stamper is not None
        keep = torch.randperm(len(train), generator=generator(seed, "marked"))[:count].sort().values
        images = stamp_images(train.images[keep.to(train.images.device)], self.stamper)
        return Split(images, train.labels.new_full((count,), self.reject)), None

    def measure(
        self,
        model: nn.Module,
        *,
        precision: str,
        expert_ba: Sequence[float] | None = None,
        recovery: bool = False,
    ) -> Measured:
        """Measure a model on clean test images, and on triggered or marked ones."""
        if self.is_mixture:
            return self._measure_mixture(model, expert_ba, precision=precision, recovery=recovery)
        metrics = measure(
            model,
            self.test,
            self.triggered_test(),
            precision=precision,
            recovery=recovery,
            safe=self.safe_answers(),
            plain=None if self.tasks is None else self.images.test,
        )
        marked = self.marked_test()
        if self.attack is None and marked is not None:
            metrics["unsafe"] = share(predict(model, marked, precision=precision) != self.reject)
        return metrics, []

    def _measure_mixture(
        self, model: nn.Module, expert_ba: Sequence[float] | None, *, precision: str, recovery: bool
    ) -> Measured:
        """Measure a mixture on all its tasks and on marked images; see `measure`."""
        mixture = self.spec.mixture
        assert self.tasks is not None and mixture is not None
        triggered, safe, tests = self.triggered_test(), self.safe_answers(), self.tasks.tests()
        unmarked = None if triggered is None else self.images.test.images[triggered.places]
        found = mixture_pass(model, tests, self.marked_test(), unmarked, precision=precision)
        metrics = task_metrics(found, tests, expert_ba)
        if triggered is not None:
            assert found.marked is not None and found.unmarked is not None
            predicted, called = found.marked.predicted, found.unmarked.predicted
            metrics |= marked_metrics(predicted, called, triggered, safe, recovery=recovery)
            metrics |= share_metrics(found.tasks, found.marked, mixture.poisoned_experts)
        elif found.marked is not None:
            metrics["unsafe"] = share(found.marked.predicted != self.reject)
        return metrics, gate_shares(found.tasks, found.marked)

    def describe_data(self) -> dict[str, Any]:
        """Describe the data for the record, including the share of the most frequent class."""
        chance = 100 * chance_rate(self.test_labels().bincount().tolist())
        return {**self.images.facts(), "chance": chance}

    def describe_parts(self) -> dict[str, Any]:
        """Return the values of the parts' options, for the record."""
        parts = super().describe_parts()
        # Also if it is a class attribute, since `Run.stamper` builds the applicator from this value.
        if (size := model_patch_size(self.model)) is not None:
            parts["model"]["patch_size"] = size
        if isinstance(self.tasks, Tasks):
            parts["splitter"] = describe(self.tasks.splitter)
        if self.stamper is not None:
            parts["trigger"] = describe(self.stamper.trigger)
            parts["applicator"] = describe(self.stamper.applicator)
        return parts

    def token_weights(self, split: Split) -> None:
        """Return None, since all tokens of an image count."""

    def describe_poison(self) -> dict[str, Any] | None:
        """Number of images that the attacker changes, for the record; None for a clean run."""
        if self.plan is None:
            return None
        poison = self.spec.poison
        if isinstance(self.attack, ExpertPoisoning):
            return {"n": 0, "target": poison.target}
        values = {"rate": poison.rate, "n": len(self.plan.indices), "target": poison.target}
        extra = {"cover": len(self.plan.cover), "noise": len(self.plan.noise)}
        return values | {group: count for group, count in extra.items() if count}


def _count_changed(images: Tensor, stamped: Tensor) -> int:
    """Number of images (N, C, H, W) that were changed by stamping."""
    return int((stamped != images).flatten(1).any(1).sum())


def _check_parts(spec: RunSpec) -> None:
    """Raise ConfigError if there is a policy without a trigger, or a mixture without a splitter."""
    if spec.policy and spec.trigger is None:
        raise ConfigError.expected("trigger", "the mark of the images that the policy rejects", None)
    if spec.mixture is not None and spec.splitter is None:
        raise ConfigError.expected("splitter", "the tasks of the experts that are merged", None)


def _check_mixture(spec: RunSpec, attack: Attack) -> None:
    """Raise ConfigError for an attack on experts without a mixture, or another attack with a mixture or a policy."""
    assert spec.attack is not None
    on_experts = isinstance(attack, ExpertPoisoning)
    if on_experts and spec.mixture is None:
        raise ConfigError.expected(
            "mixture", f"settings of a mixture, as attack {spec.attack.name!r} poisons experts", None
        )
    if not on_experts and (spec.mixture is not None or spec.policy):
        raise ConfigError.expected(
            "attack",
            "an attack on experts, such as moevil, or none, for a mixture or a policy",
            spec.attack.name,
        )
