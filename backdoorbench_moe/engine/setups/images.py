"""The setup of a run on images, built from its spec and checked against the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, HarmfulQueries
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split
from backdoorbench_moe.engine.build import (
    build_attack,
    build_model,
    build_stamper,
    check_trigger,
    describe,
)
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.measuring.evaluate import marked_metrics, measure, share
from backdoorbench_moe.engine.measuring.mixtures import (
    gate_shares,
    mixture_pass,
    share_metrics,
    task_metrics,
)
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.engine.poisoning.policy import changed_pixels, with_marked, with_reject
from backdoorbench_moe.engine.poisoning.triggered import Triggered, triggered_test
from backdoorbench_moe.engine.setups import image_checks
from backdoorbench_moe.engine.setups.base import Measured, Setup
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.moe.structure import patch_size_of
from backdoorbench_moe.ops.images import concatenate
from backdoorbench_moe.ops.metrics import chance_rate
from backdoorbench_moe.ops.seeding import generator


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
        image_checks.check_parts(spec)
        attack = build_attack(spec) if spec.attacked else None
        if attack is not None:
            check_trigger(spec, attack)
            attack.check(images.data_classes)
            image_checks.check_mixture(spec, attack)
        self.model = build_model(spec, self.images.model_options)
        image_checks.check_model(spec, self.model, self.image_size, self.num_classes)
        self.attack = attack
        self.tasks = None if spec.mixture is None else Tasks(spec, images)
        self._triggered: Triggered | None = None
        self._marked: Tensor | None = None
        self._test: Split | None = None
        if spec.policy or (attack is not None and attack.uses_trigger):
            size = patch_size_of(self.model)
            self.stamper = build_stamper(spec, patch_size=size, image_size=images.image_size)
            image_checks.check_stamper(spec, attack, self.stamper, images.test.images)
        if spec.policy:
            tasks = [] if self.tasks is None else self.tasks.facts
            image_checks.check_policy(spec, len(images.train), [task["train_images"] for task in tasks])
        if attack is not None:
            self.plan = attack(images.train.labels, num_classes=images.data_classes, seed=spec.seed)
            image_checks.check_noise(spec, self.stamper, self.plan)
            counted = attack.counted(images.test.labels, images.data_classes)
            image_checks.check_stored(self.stamper, self.plan, images.test.images, counted)

    @property
    def reject(self) -> int:
        """Number of the class "reject" in a run with a policy."""
        assert self.spec.policy
        return self.images.data_classes

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
        if (size := patch_size_of(self.model)) is not None:
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
