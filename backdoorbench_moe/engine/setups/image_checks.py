"""Checks of the parts of a run on images against each other and the data, before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backdoorbench_moe import models
from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning
from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.build import Stamper, cut
from backdoorbench_moe.engine.poisoning.learned import learned_trigger
from backdoorbench_moe.engine.poisoning.poison import stamp_images, stamp_places
from backdoorbench_moe.engine.poisoning.policy import policy_count
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, PluginError
from backdoorbench_moe.moe.routed import forward
from backdoorbench_moe.moe.temporary import evaluation_mode
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.triggers.stored import StoredTrigger
from backdoorbench_moe.triggers.trainable import TrainableTrigger
from backdoorbench_moe.wording.counting import count

# Number of images on which the visibility of the trigger is checked.
VISIBLE_ON = 64


def check_parts(spec: RunSpec) -> None:
    """Raise ConfigError if there is a policy without a trigger, or a mixture without a splitter."""
    if spec.policy and spec.trigger is None:
        raise ConfigError.expected("trigger", "the mark of the images that the policy rejects", None)
    if spec.mixture is not None and spec.splitter is None:
        raise ConfigError.expected("splitter", "the tasks of the experts that are merged", None)


def check_model(spec: RunSpec, model: nn.Module, image_size: int, num_classes: int) -> None:
    """Check that a third-party model has parameters, and maps two images to logits of all classes.

    Raises:
        PluginError: It does not. An exception of the model itself is not caught.
    """
    name = spec.model.name
    candidate = models.registry.candidate(name.partition(":")[0])
    if candidate is not None and candidate.builtin:
        return
    place = f"model {name!r}" + (f" from {candidate.origin}" if candidate else "")
    if not any(weight.requires_grad for weight in model.parameters()):
        raise PluginError(f"{place}: expected parameters to train, got none")
    with torch.no_grad(), seeded(spec.seed, "init"), evaluation_mode(model):
        logits: object = forward(model, torch.zeros(2, 3, image_size, image_size))[0]
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (2, num_classes):
        raise PluginError(
            f"{place}: expected logits (2, {num_classes}) of 2 images and {num_classes} classes, got {got}"
        )


def check_mixture(spec: RunSpec, attack: Attack) -> None:
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


def check_stamper(spec: RunSpec, attack: Attack | None, stamper: Stamper, images: Tensor) -> None:
    """Check that a trigger can be used as the run uses it, and that it is visible.

    Args:
        spec: The run's spec.
        attack: Its attack; None for a clean run with a policy.
        stamper: Its trigger and applicator.
        images: (N, C, H, W) uint8, the test images.

    Raises:
        ConfigError: The trigger cannot be used so, or changes no image.
    """
    _check_learned(spec, attack, stamper)
    if isinstance(stamper.trigger, StoredTrigger):
        _check_uses_of_stored(spec, attack, stamper, images[:1] / 255)
    elif not spec.defenses:  # Otherwise it was checked for the attacked run.
        _check_visible(spec, attack, stamper, images[:VISIBLE_ON])


def _check_learned(spec: RunSpec, attack: Attack | None, stamper: Stamper) -> None:
    """Check that a learned trigger is compatible with the attack.

    Raises:
        ConfigError: The trigger is the mark of a policy or of harmful queries; or it is trained with the model, but the
            attacker does not control the training; or the attacker does, but the trigger is optimised on a surrogate.
    """
    trigger = learned_trigger(stamper)
    if trigger is None:
        return
    assert spec.trigger is not None
    name = spec.trigger.name
    if spec.policy or isinstance(attack, ExpertPoisoning):
        raise ConfigError.expected("trigger", "one that is not learned, as the mark of images", name)
    assert spec.attack is not None
    trainable, controlled = isinstance(trigger, TrainableTrigger), isinstance(attack, TrainingControl)
    if trainable and not controlled:
        expected = f"training-control, as the trigger {name!r} is trained with the model"
        raise ConfigError.expected("attack", expected, spec.attack.name)
    if controlled and not trainable:
        expected = "one that is not optimised on a surrogate, where the attacker trains the model"
        raise ConfigError.expected("trigger", expected, name)


def _check_uses_of_stored(spec: RunSpec, attack: Attack | None, stamper: Stamper, image: Tensor) -> None:
    """Check that a trigger with stored images stamps complete images of a fixed plan only.

    It does not change any others: tiles, marked training images, and images that are poisoned in every batch, which are
    stamped with random places.

    Args:
        spec: The run's spec.
        attack: Its attack; None for a clean run with a policy.
        stamper: Its trigger and applicator.
        image: (1, C, H, W) float in [0, 1], any test image.

    Raises:
        ConfigError: Others would be stamped, too.
    """
    assert spec.trigger is not None and spec.applicator is not None
    name = spec.trigger.name
    if spec.policy or isinstance(attack, ExpertPoisoning):
        raise ConfigError.expected("trigger", "one that can stamp any image, as the mark of images", name)
    if isinstance(attack, TrainingControl):
        expected = "one that can stamp any image, where batches are poisoned"
        raise ConfigError.expected("trigger", expected, name)
    if cut(stamper.applicator, image).shape != image.shape:
        expected = f"one that stamps the complete image, for the trigger {name!r}"
        raise ConfigError.expected("applicator", expected, spec.applicator.name)


def _check_visible(spec: RunSpec, attack: Attack | None, stamper: Stamper, images: Tensor) -> None:
    """Check that the test and training forms of the trigger change 8-bit images (N, C, H, W).

    Warns if fewer than half of the images change, such as dark images under a black square.

    Raises:
        ConfigError: No image changes, such as with a warp of tiles of one pixel.
    """
    test = stamp_images(images, stamper)
    _check_changed(spec, attack, images, test)
    if not spec.policy:
        training = stamp_places(images, torch.arange(len(images), device=images.device), stamper.training)
        if not torch.equal(training, test):
            _check_changed(spec, attack, images, training, " in its training form")


def _check_changed(
    spec: RunSpec, attack: Attack | None, images: Tensor, stamped: Tensor, form: str = ""
) -> None:
    """Raise ConfigError if a form of the trigger changes none of the images, or warn if fewer than half."""
    assert spec.trigger is not None and spec.applicator is not None
    changed = int((stamped != images).flatten(1).any(1).sum())
    if 2 * changed >= len(images):
        return
    message = (
        f"trigger: {spec.trigger.name!r}{form} with the applicator {spec.applicator.name!r} changes "
        f"{changed or 'none'} of {count(len(images), 'test image')}"
    )
    if changed:
        warnings.warn(f"{message}; the others are unchanged", BbmoeWarning, stacklevel=2)
        return
    if spec.policy:
        raise ConfigError(f"{message}, so it cannot be the mark of images to reject")
    if isinstance(attack, ExpertPoisoning):
        raise ConfigError(f"{message}, so it cannot be the mark of harmful queries")
    side = images.shape[-1]
    raise ConfigError(f"{message}: at {side}x{side} pixels it cannot be distinguished from the image")


def check_policy(spec: RunSpec, images: int, task_images: Sequence[int]) -> None:
    """Check that a policy marks at least one training image.

    Args:
        spec: The spec of a run with a policy.
        images: Number of training images.
        task_images: Those of each task of a mixture; empty without a mixture.

    Raises:
        ConfigError: A rate is below one image.
    """
    policy_count(images, spec.policy)
    if spec.mixture is not None and (rate := spec.mixture.expert_policy):
        for of_task in task_images:
            policy_count(of_task, rate, "mixture.expert_policy")


def check_noise(spec: RunSpec, stamper: Stamper | None, plan: PoisonPlan) -> None:
    """Raise ConfigError if a plan has noise images, but the trigger has no noise form."""
    if len(plan.noise) and (stamper is None or not stamper.trigger.has_noise):
        name = "a run without a trigger" if spec.trigger is None else f"the trigger {spec.trigger.name!r}"
        raise ConfigError(f"poison.noise: {name} has no noise form")


def check_stored(stamper: Stamper | None, plan: PoisonPlan, test: Tensor, counted: Tensor) -> None:
    """Check that a trigger with stored images contains all images that the attack stamps.

    Args:
        stamper: The run's trigger and applicator, if any.
        plan: The training images that the attacker changes.
        test: (N, C, H, W) uint8, the test images.
        counted: (N,) bool, those that count for ASR.

    Raises:
        ConfigError: An image is missing.
    """
    if stamper is None or not isinstance(trigger := stamper.trigger, StoredTrigger):
        return
    test, training = test[counted], torch.cat(list(plan.groups.values()))
    found = {
        "test": (trigger.missing(test), len(test)),
        "training": (trigger.missing_places(training), len(training)),
    }
    for split, (missing, stamped) in found.items():
        if missing:
            raise ConfigError(
                f"trigger.file: expected stored versions of the {stamped} {split} images that the attack stamps, "
                f"but {missing} are missing"
            )
