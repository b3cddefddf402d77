"""Training settings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from backdoorbench_moe.config.merge import Values
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.options import convert_fields

# The steps of `augment`; `ops.augmentation` implements them.
AUGMENTATIONS = ("crop", "flip", "rotate", "colour", "erase")
NO_AUGMENTATION = "none"
# Far more than any training needs. Larger numbers are slips, whose trainings would not end or not fit into 64 bits.
MOST_EPOCHS, MOST_IMAGES = 100_000, 1_000_000
# Keys that were added later. `to_dict` leaves them out if they have their defaults, so that the digests of older specs
# are unchanged.
LEFT_OUT_AT_DEFAULT = (
    "augment",
    "milestones",
    "gamma",
    "label_smoothing",
    "clip_grad",
    "freeze",
    "accumulate",
)


@dataclass(frozen=True)
class TrainSpec:
    """Training settings.

    Args:
        epochs: Number of passes over the training set, from 1 to `MOST_EPOCHS`; or 0 for a base or a clean model that
            is loaded from weights and not trained.
        batch_size: Number of images in a batch, from 1 to `MOST_IMAGES`. Each batch is one step of the optimizer unless
            `accumulate` is set; the last batch of an epoch may be smaller.
        optimizer: "sgd" or "adamw".
        lr: Peak learning rate, above 0.
        momentum: Momentum of SGD, in [0, 1); ignored by AdamW.
        nesterov: Whether SGD uses Nesterov momentum; `momentum` must then be above 0.
        weight_decay: Weight decay, at least 0; not applied to biases and the parameters of normalisation layers.
        schedule: Learning rate schedule. "constant"; "one-cycle": linear from 0 to `lr` during the warmup, then linear
            to 0; "cosine": from `lr` towards 0 along half a cosine, without a warmup; or "step": multiplied by `gamma`
            at each of the `milestones`.
        warmup: Share of all steps that are the warmup of "one-cycle", in [0, 1); ignored by other schedules.
        augment: Random augmentation of every batch: "none", or steps joined by hyphens, such as "crop-flip", which are
            applied in the given order. The steps are "crop", "flip", "rotate", "colour" and "erase"; see
            `ops.augmentation`. A stamped trigger is augmented with its image.
        milestones: Where "step" lowers the learning rate, as shares of all steps, ascending, each in (0, 1): 0.6 is
            epoch 60 of 100. Ignored by other schedules.
        gamma: Factor of the learning rate at each milestone, in (0, 1].
        label_smoothing: Share of the label's probability that the cross-entropy spreads evenly over all classes, in
            [0, 1). Ignored by trainings with another loss.
        clip_grad: Maximum norm of the gradient over all parameters of the model, above 0; a larger gradient is scaled
            down to it. None for no limit.
        freeze: Patterns for the names of parameters that are not trained, such as "network.layer1.*"; "*" matches any
            text. A batch norm whose parameters are all frozen also keeps its statistics. Attacks and defenses that
            fine-tune the model afterwards train these parameters as well.
        accumulate: Number of batches whose gradients are accumulated for one step of the optimizer, from 1 to
            `MOST_IMAGES`. The step is that of one batch of the combined size, with the memory use of a single batch. It
            is equal up to rounding for the plain cross-entropy and models without batch statistics or randomness.
            Losses of attacks and defenses, and auxiliary losses of routed layers, are averaged over the batches,
            weighted by number of images.

    Raises:
        ConfigError: A value is out of range.
    """

    epochs: int = 25
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle", "cosine", "step"] = "constant"
    warmup: float = 0.25
    augment: str = NO_AUGMENTATION
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    freeze: tuple[str, ...] = ()
    accumulate: int = 1

    def __post_init__(self) -> None:
        convert_fields(self, "train.", (item.name for item in fields(self)))
        checks = {
            "epochs": (0 <= self.epochs <= MOST_EPOCHS, f"an integer from 0 to {MOST_EPOCHS}"),
            "batch_size": (1 <= self.batch_size <= MOST_IMAGES, f"an integer from 1 to {MOST_IMAGES}"),
            "accumulate": (1 <= self.accumulate <= MOST_IMAGES, f"an integer from 1 to {MOST_IMAGES}"),
            "lr": (0 < self.lr < float("inf"), "a positive number"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "a number of at least 0"),
            "warmup": (0 <= self.warmup < 1, "a number in [0, 1)"),
            "milestones": (
                self.milestones and _ascending((0.0, *self.milestones, 1.0)),
                "ascending shares of all steps, each between 0 and 1 (0.6 is epoch 60 of 100)",
            ),
            "gamma": (0 < self.gamma <= 1, "a number in (0, 1]"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            "clip_grad": (
                self.clip_grad is None or 0 < self.clip_grad < float("inf"),
                "a positive number or none",
            ),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError.expected(f"train.{name}", expected, getattr(self, name))
        if self.nesterov and self.optimizer == "sgd" and not self.momentum:
            raise ConfigError.expected("train.momentum", "a positive number where train.nesterov is set", 0)
        for name in self.augmentations:
            if name not in AUGMENTATIONS:
                raise UnknownNameError("train.augment: step", name, (NO_AUGMENTATION, *AUGMENTATIONS))
        if len(set(self.augmentations)) != len(self.augmentations):
            raise ConfigError.expected("train.augment", "each step once", self.augment)

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The steps of `augment`, in order; empty for "none"."""
        return () if self.augment == NO_AUGMENTATION else tuple(self.augment.split("-"))

    def to_dict(self) -> Values:
        """Return the values as a plain dict, without the keys of `LEFT_OUT_AT_DEFAULT` that have their defaults."""
        return dict(self._values)

    @cached_property
    def _values(self) -> Values:
        items = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        kept = {
            k for k, (value, default) in items.items() if k not in LEFT_OUT_AT_DEFAULT or value != default
        }
        return {name: value for name, (value, _) in items.items() if name in kept}


def _ascending(values: tuple[float, ...]) -> bool:
    """Whether each value is larger than the previous one."""
    return all(one < other for one, other in itertools.pairwise(values))
