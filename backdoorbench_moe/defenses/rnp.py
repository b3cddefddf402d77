"""RNP: unlearn the clean task, find the channels that recover it least, and prune them in the original model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.masking import (
    MaskedModel,
    MaskPruning,
    batch_statistics,
    images_of_steps,
    shuffled_batches,
    steps_of_epoch,
)
from backdoorbench_moe.moe.precision import in_precision
from backdoorbench_moe.moe.units import Units
from backdoorbench_moe.ops.images import as_input
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_share

# The source's code multiplies the loss by this when masks are learned.
LOSS_WEIGHT = 0.2
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
# Largest norm of the gradient of all weights.
CLIP = 20.0


class RNP(MaskPruning):
    """Reconstructive neuron pruning: unlearn clean images, recover them with masks, and prune what stays masked.

    1. Unlearn: a copy of the model is trained by gradient ascent on the clean images, until its accuracy on them, in
       training mode, is at most `unlearn_to`.
    2. Recover: masks of the copy's channels are learned by gradient descent on the same images. A mask, in [0, 1],
       multiplies the channel's scale.
    3. Prune: channels with a low mask are pruned in the *original* model, whose weights are otherwise unchanged.

    The threshold is fixed, or determined by the clean accuracy (`accuracy_drop`). The original tries several thresholds
    and reports the attack success rate on test images for each, which a defender cannot measure.

    Departures: gradients are clipped after they are computed; the original code clips those of the previous step. The
    learning rate of unlearning is constant; the original code lowers it to a tenth after 10 epochs, and again after 20.
    If the accuracy does not fall to `unlearn_to` within `epochs` epochs, the copy is used as it is; the detail
    "unlearned_to" of the judgement is the accuracy that was reached, in percent. Images are not augmented. Masks of
    layer norms, group norms, experts and gates are our extension.

    Args:
        threshold: Units with a mask of at most this value are pruned, in [0, 1).
        accuracy_drop: If given, it replaces `threshold`: thresholds are tried in the order 0, 0.05, ... 0.95, and the
            last one is used before accuracy on the defender's images falls by more than this many percentage points. If
            it falls by more at 0, nothing is pruned.
        unlearn_to: Accuracy at which unlearning ends, in [0, 1].
        unlearn_lr: Learning rate of unlearning, above 0.
        mask_lr: Learning rate of the masks, above 0.
        epochs: Largest number of epochs of unlearning, and number of epochs of recovery; from 1.
        batch_size: Images in a step, from 2.
        experts: Whether to mask complete experts and their gates, too. False: as in the original, which has no experts.
            None: True if the model names its experts.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]; 0.01 in the original.

    Raises:
        ConfigError: A value is out of range, or the model has no norms with a scale.

    Source:
        Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section 3, and its code
        bboylyg/RNP.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1, "batch_size": 12}
    reason = "the clean task, once unlearned, is recovered without them"
    strength = "unlearn_lr"

    def __init__(
        self,
        *,
        threshold: float = 0.7,
        accuracy_drop: float | None = None,
        unlearn_to: float = 0.2,
        unlearn_lr: float = 0.01,
        mask_lr: float = 0.2,
        epochs: int = 20,
        batch_size: int = 128,
        experts: bool | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(
            threshold=threshold, accuracy_drop=accuracy_drop, experts=experts, clean_fraction=clean_fraction
        )
        check_integer("epochs", epochs, 1)
        check_integer("batch_size", batch_size, 2)
        check_positive(unlearn_lr=unlearn_lr, mask_lr=mask_lr)
        check_share(unlearn_to=unlearn_to)
        self.unlearn_to, self.unlearn_lr, self.mask_lr = unlearn_to, unlearn_lr, mask_lr
        self.epochs, self.batch_size = epochs, batch_size

    def learn_masks(self, task: DefenseTask, units: Sequence[Units]) -> tuple[list[Tensor], dict[str, float]]:
        """Unlearn on a copy, and learn the masks that recover it."""
        unlearned, accuracy = self.unlearn(task)
        masked = MaskedModel(unlearned, units, task.device, task.precision)
        optimizer = torch.optim.SGD(masked.masks, lr=self.mask_lr, momentum=MOMENTUM)
        steps = self.epochs * steps_of_epoch(len(task.clean), self.batch_size)
        with batch_statistics(unlearned):
            for step, batch in enumerate(
                islice(shuffled_batches(task.clean, self.batch_size, task.seed), steps), 1
            ):
                loss = LOSS_WEIGHT * masked.loss(batch)
                masked.backward(loss)
                optimizer.step()
                masked.clip()
                # Unlearning was the first half.
                task.progress(steps + step, 2 * steps)
        return masked.masks, {"unlearned_to": accuracy}

    def trained_images(self, held: int) -> int:
        """Unlearning takes at most as many epochs as recovery; it can end earlier."""
        return 2 * images_of_steps(held, self.batch_size, self.epochs * steps_of_epoch(held, self.batch_size))

    def unlearn(self, task: DefenseTask) -> tuple[nn.Module, float]:
        """Unlearn the clean images.

        Returns:
            The unlearned copy of the model, in evaluation mode; and its accuracy in the last epoch, in percent and in
            training mode.
        """
        model = copy.deepcopy(task.model)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.unlearn_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        steps = steps_of_epoch(len(task.clean), self.batch_size)
        feed = shuffled_batches(task.clean, self.batch_size, task.seed)
        model.train()
        accuracy = 100.0
        for epoch in range(1, self.epochs + 1):
            hits = torch.zeros((), dtype=torch.int64, device=task.device)
            for batch in islice(feed, steps):
                with in_precision(task.device, task.precision):
                    logits = model(as_input(batch.images))
                optimizer.zero_grad(set_to_none=True)
                (-F.cross_entropy(logits.float(), batch.labels)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                hits += (logits.argmax(1) == batch.labels).sum()
            accuracy = 100 * hits.item() / images_of_steps(len(task.clean), self.batch_size, steps)
            task.progress(epoch * steps, 2 * self.epochs * steps)
            if accuracy <= 100 * self.unlearn_to:
                break
        return model.eval(), accuracy
