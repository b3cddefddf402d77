"""ANP: prune the channels that are most sensitive to an adversarial perturbation of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.defenses.masking import (
    MaskedModel,
    MaskPruning,
    batch_statistics,
    images_of_steps,
    shuffled_batches,
)
from backdoorbench_moe.moe.units import Units
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_share
from backdoorbench_moe.ops.seeding import generator


class ANP(MaskPruning):
    """Adversarial neuron pruning: learn which channels are sensitive to a worst-case perturbation, and prune them.

    A channel computes (m + d) gamma x + (1 + xi) beta, with a mask m in [0, 1] and relative perturbations d and xi of
    its scale and shift, drawn from [-`eps`, `eps`]. In every step, the perturbations are first moved by `eps` along the
    sign of the gradient, so that the loss increases. Then a step of SGD with momentum 0.9 over the masks decreases
    `alpha` CE + (1 - `alpha`) CE_perturbed. Channels that carry a backdoor are the most sensitive to perturbations, and
    get low masks.

    The threshold is fixed, or determined by the clean accuracy (`accuracy_drop`). The original tries several thresholds
    and reports the attack success rate on test images for each, which a defender cannot measure.

    As in the original, batch norms use the statistics of the batch while masks are learned, the perturbations are not
    clipped to `eps` after the gradient step (they are at most 2 `eps`), and only the scale is masked. Departures:
    images are drawn without replacement in each epoch, in the original with replacement; images are not augmented.
    Masks of layer norms, group norms, experts and gates are our extension.

    Args:
        threshold: Units with a mask of at most this value are pruned, in [0, 1).
        accuracy_drop: If given, it replaces `threshold`: thresholds are tried in the order 0, 0.05, ... 0.95, and the
            last one is used before accuracy on the defender's images falls by more than this many percentage points. If
            it falls by more at 0, nothing is pruned.
        steps: Number of steps, from 1.
        eps: Bound of the initial perturbations, and length of the gradient step, relative to scale and shift; above 0.
        alpha: Weight of the loss without perturbations, in [0, 1].
        mask_lr: Learning rate of the masks, above 0.
        batch_size: Images in a step, from 2.
        experts: Whether to mask and perturb complete experts and their gates, too. False: as in the original, which has
            no experts. None: True if the model names its experts.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]; 0.01 in the original.

    Raises:
        ConfigError: A value is out of range, or the model has no norms with a scale.

    Source:
        Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021, section 4, and its code
        csdongxian/ANP_backdoor.
    """

    tiny: ClassVar[Mapping[str, object]] = {"steps": 2, "batch_size": 12}
    reason = "an adversarial change of scale and shift does most harm there"
    strength = "eps"

    def __init__(
        self,
        *,
        threshold: float = 0.2,
        accuracy_drop: float | None = None,
        steps: int = 2000,
        eps: float = 0.4,
        alpha: float = 0.2,
        mask_lr: float = 0.2,
        batch_size: int = 128,
        experts: bool | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(
            threshold=threshold, accuracy_drop=accuracy_drop, experts=experts, clean_fraction=clean_fraction
        )
        check_integer("steps", steps, 1)
        check_integer("batch_size", batch_size, 2)
        check_positive(eps=eps, mask_lr=mask_lr)
        check_share(alpha=alpha)
        self.steps, self.eps, self.alpha = steps, eps, alpha
        self.mask_lr, self.batch_size = mask_lr, batch_size

    def learn_masks(self, task: DefenseTask, units: Sequence[Units]) -> tuple[list[Tensor], dict[str, float]]:
        """Learn the masks under adversarial perturbations."""
        masked = MaskedModel(task.model, units, task.device, task.precision)
        optimizer = torch.optim.SGD(masked.masks, lr=self.mask_lr, momentum=0.9)
        draws = generator(task.seed, "changes")
        with batch_statistics(task.model):
            for step, batch in enumerate(
                islice(shuffled_batches(task.clean, self.batch_size, task.seed), self.steps), 1
            ):
                noise, shifts = self._worst_change(masked, batch, draws)
                loss = (1 - self.alpha) * masked.loss(batch, noise, shifts)
                if self.alpha:
                    loss = loss + self.alpha * masked.loss(batch)
                masked.backward(loss)
                optimizer.step()
                masked.clip()
                task.progress(step, self.steps)
        return masked.masks, {}

    def trained_images(self, held: int) -> int:
        """Each step has a pass to find the perturbations, one with them, and one without them if `alpha` is above 0."""
        return (2 + (self.alpha > 0)) * images_of_steps(held, self.batch_size, self.steps)

    def _worst_change(
        self, masked: MaskedModel, batch: Split, draws: torch.Generator
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Draw perturbations and move them so that the loss rises.

        Returns:
            The values to add to the masks, (n,) for each of the units; and the factors of the shifts, by the norm's
            name.
        """
        channels = [units for units in masked.units if units.kind == "channel"]
        sizes = [len(units) for units in (*masked.units, *channels)]
        changes = [
            (2 * torch.rand(size, generator=draws) - 1).mul(self.eps).to(masked.device) for size in sizes
        ]
        for change in changes:
            change.requires_grad_()
        noise, moved = changes[: len(masked.units)], changes[len(masked.units) :]
        shifts = {units.layer: 1 + change for units, change in zip(channels, moved, strict=True)}
        loss = masked.loss(batch, noise, shifts)
        gradients = torch.autograd.grad(loss, changes, materialize_grads=True)
        worst = [
            change.detach() + self.eps * gradient.sign()
            for change, gradient in zip(changes, gradients, strict=True)
        ]
        noise, moved = worst[: len(masked.units)], worst[len(masked.units) :]
        return noise, {units.layer: 1 + change for units, change in zip(channels, moved, strict=True)}
