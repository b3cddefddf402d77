"""Training control: the attacker trains the model and hands it over to the victim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.base import Attack, PoisonPlan
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError


@dataclass(frozen=True)
class ControlledBatch:
    """A batch of an attacker who trains the model.

    Args:
        images: (B, 3, H, W) float in [0, 1], the images to train on: first those with the trigger, then those with its
            noise form, then clean ones.
        labels: (B,) int64, the labels to learn: the attacker's for the images with the trigger, else the true ones.
        clean: (B, 3, H, W) float in [0, 1], the same images without the trigger and noise.
        truth: (B,) int64, their true labels.
        poison: Number of images with the trigger; may be 0 in the last batch of an epoch, which can be smaller.
        noise: Number of images with the noise form; may be 0.
        usual_loss: Maps a model to its logits (B, classes) for `images` and the usual loss, a scalar: cross-entropy
            with `labels`, smoothed as in the recipe, plus the auxiliary losses of routed layers.
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    truth: Tensor
    poison: int
    noise: int
    usual_loss: Callable[[nn.Module], tuple[Tensor, Tensor]]


class TrainingControl(Attack):
    """Train the model on batches in which randomly drawn images are poisoned, and hand it over.

    The victim has outsourced the training. In every batch, a share of the images is stamped and relabelled, and another
    share is stamped with the noise form and keeps its labels. The training set itself is not changed, so the defender's
    share of it is clean. A trigger that consists of networks is trained together with the model.

    Departure: images are augmented before they are stamped, as in the code of the input-aware attack. WaNet's code
    augments them afterwards, so that the model also sees shifted and rotated triggers.

    Subclasses may override `loss`, for an attacker who trains the model with a loss of their own.

    Args:
        poison: Rates of poison and noise, as shares of a batch, rounded down; target class and mapping.

    Raises:
        ConfigError: In `check`: the poison rate is 0, or another setting is not its default.

    Source:
        WaNet (Nguyen and Tran, ICLR 2021) and the input-aware attack (Nguyen and Tran, NeurIPS 2020).
    """

    implies: ClassVar[Mapping[str, Any]] = {
        "trigger": "input-aware",
        "applicator": "image",
        "poison": {"rate": 0.1, "noise": 0.1},
    }
    deviations: ClassVar[Mapping[str, str]] = {
        "test_settings_are_followed_or_refused": "noise images are drawn in every batch and are in no plan"
    }

    def __init__(self, *, poison: PoisonSpec) -> None:
        super().__init__(poison=poison)

    def check(self, num_classes: int) -> None:
        """Check the classes, and refuse settings that this attack ignores.

        Raises:
            ConfigError: A class does not exist, a rate is out of range, or a cover group, labels or source classes are
                set.
        """
        super().check(num_classes)
        poison, why = self.poison, "where poisoned images are redrawn in every batch"
        if not poison.rate:
            raise ConfigError.expected("poison.rate", "a number in (0, 1]", poison.rate)
        if poison.rate + poison.noise > 1:
            raise ConfigError.expected("poison.noise", "at most 1 - poison.rate", poison.noise)
        for name, default in (("cover", 0.0), ("labels", "dirty"), ("source", ())):
            if (value := getattr(poison, name)) != default:
                raise ConfigError.expected(f"poison.{name}", f"{default!r} {why}", value)

    def plan(self, labels: Tensor, num_classes: int, seed: int) -> PoisonPlan:
        """Change no image of the training set."""
        nothing = torch.empty(0, dtype=torch.int64)
        return PoisonPlan(nothing, nothing)

    def loss(self, model: nn.Module, batch: ControlledBatch) -> tuple[Tensor, Tensor]:
        """Return the logits for a batch and the loss that the attacker minimises.

        Called in every training step, in the precision of the run. On a GPU, the step may be captured as a CUDA graph:
        shapes must not depend on values, and the host must not wait for the device. Random values come from torch's
        global generator, which is seeded for each epoch.

        Args:
            model: The model, in training mode.
            batch: The poisoned batch.

        Returns:
            Logits (B, classes), from which the training accuracy is computed, and the loss, a scalar. The loss of a
            trigger that is trained together with the model is added to it.
        """
        return batch.usual_loss(model)
