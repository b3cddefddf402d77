"""Distillation of a model into itself on clean images with random stamps, without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.random_stamps import Tiles, apply_all, draw_stamps, strengthen
from backdoorbench_moe.defenses.requirements import check_tuning
from backdoorbench_moe.defenses.stamps import ApplicatorName, canvas_side, check_patch_size
from backdoorbench_moe.moe.routed import auxiliary_loss, forward
from backdoorbench_moe.moe.temporary import evaluation_mode
from backdoorbench_moe.ops.augmentation import crop, flip
from backdoorbench_moe.ops.ranges import check_integer, check_interval, check_positive
from backdoorbench_moe.ops.tuning import Objective


class TileDistillation(Defense):
    """Teach the model to answer as before when a random stamp is in all tiles of an image.

    The teacher is the model before the defense. It sees clean images, so the trigger does not affect its answers. The
    model sees the same images, some of which get a new random stamp in every batch, as in `tile-tuning`, and learns the
    teacher's answers: the probabilities of all classes. They say more about an image than its label, so a few images
    are enough to keep most of the clean accuracy. No label is needed. The model also learns the teacher's mistakes on
    clean images.

    Stamped images cost clean accuracy, so few of them should do much. Therefore, the values of each random stamp are
    moved along the sign of the gradient before it is used (`steps`), so that the model's answers differ more from the
    teacher's, as a trigger makes them differ.

    Each batch is varied: images are shifted by up to 4 pixels, half of them are flipped, and each is mixed with the
    next image of the batch, with a weight drawn from [0, 1). The recipe's augmentation is not applied in addition. The
    loss is the cross-entropy between the softened probabilities, times the squared temperature, plus the auxiliary
    losses of routed layers. The training accuracy in the record compares varied images with the original labels.

    Plain tuning for as many epochs is a comparison with labels and without stamps. To see what the distillation alone
    does, use `share=0`.

    The defaults were chosen on CIFAR-10, for a pMoE with the square in every patch, by ASR and clean accuracy on the
    test images, so results in that case are optimistic.

    Args:
        tiles: The stamps; see `tile-tuning`.
        saturated: Probability in [0, 1] that all values of a stamp's colours are 0 or 1, as in the strongest triggers.
            Otherwise, they are uniform.
        steps: Number of times that each stamp is moved, from 0 (random stamps). Colours move by a number that is drawn
            from [0, 1) for each stamp, and stay in [0, 1]; displacements move as far in pixels. Which pixels are
            covered, and the opacity, stay as drawn.
        applicator: "patch", or "image" for one stamp on the full image.
        patch_size: With "patch", the side of the tile in pixels, a divisor of the image's height and width. None: that
            of the model's patches, or 4 for a model without patches.
        epochs: Epochs of distillation, from 1. The default is for 500 images; with few steps, the backdoor stays.
        share: Share of each batch that is stamped, in [0, 1].
        temperature: The logits are divided by it; above 0. At a higher temperature, improbable classes count more.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]. Their labels are not used.

    Raises:
        ConfigError: A value is out of range, or the tiles do not cover the images.

    Source:
        Ours. The loss is that of Hinton et al., "Distilling the knowledge in a neural network", 2015. Mixed images that
        the teacher sees as well, and many epochs, follow Beyer et al., "Knowledge distillation: a good teacher is
        patient and consistent", CVPR 2022. A step along the sign of the gradient from a random start is that of Wong et
        al., "Fast is better than free: revisiting adversarial training", ICLR 2020.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        tiles: Tiles = "mixed",
        saturated: float = 0.5,
        steps: int = 1,
        applicator: ApplicatorName = "patch",
        patch_size: int | None = None,
        epochs: int = 240,
        share: float = 0.25,
        temperature: float = 3.0,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_interval("share", share, "[0, 1]")
        check_interval("saturated", saturated, "[0, 1]")
        check_integer("steps", steps, at_least=0)
        check_positive(temperature=temperature)
        check_patch_size(applicator, patch_size)
        self.tiles, self.saturated, self.steps = tiles, saturated, steps
        self.applicator, self.patch_size = applicator, patch_size
        self.epochs, self.share, self.temperature, self.lr = epochs, share, temperature, lr

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if the tiles do not cover the images."""
        canvas_side(self.applicator, self.patch_size, model, image_size)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Each epoch trains with all images, and the teacher predicts them. A step costs as much as training."""
        shown = self.epochs * held
        return Cost(trained=shown * (1 + self.steps * self.share), predicted=shown)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Distil."""
        side = canvas_side(self.applicator, self.patch_size, task.model, task.image_size)
        task.tune(
            task.model,
            task.clean,
            epochs=self.epochs,
            lr=self.lr,
            objective=self._objective(copy.deepcopy(task.model).eval(), side),
        )
        return DefenseResult("distilled", task.model)

    def _objective(self, teacher: nn.Module, side: int | None) -> Objective:
        def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            images = vary(images)
            with torch.no_grad():
                wanted, _ = forward(teacher, images)
            count = round(self.share * len(images))
            if count:
                # The order of the images is random, so the first ones are a random sample.
                disagree = partial(self._disagree, model, wanted[:count])
                images = torch.cat([self._stamp(images[:count], side, disagree), images[count:]])
                images = images.contiguous(memory_format=torch.channels_last)
            logits, routing = forward(model, images)
            return logits, softened_loss(logits, wanted, self.temperature) + auxiliary_loss(routing)

        return objective

    def _stamp(self, images: Tensor, side: int | None, disagree: Callable[[Tensor], Tensor]) -> Tensor:
        stamps = draw_stamps(self.tiles, side, images, self.saturated)
        for _ in range(self.steps):
            stamps = strengthen(stamps, disagree)
        return apply_all(stamps)

    def _disagree(self, model: nn.Module, wanted: Tensor, images: Tensor) -> Tensor:
        """Return the loss in evaluation mode, so that these images are not part of the batch norms' statistics."""
        with evaluation_mode(model):
            logits, _ = forward(model, images)
        return softened_loss(logits, wanted, self.temperature)


def vary(images: Tensor) -> Tensor:
    """Shift, flip and mix images (B, 3, H, W); each is mixed with the next one. Draws from torch's global generator."""
    count, device = len(images), images.device
    images = crop(images, torch.rand(count, 2, device=device))
    images = flip(images, torch.rand(count, 1, device=device))
    weight = torch.rand(count, 1, 1, 1, device=device)
    mixed = weight * images + (1 - weight) * images.roll(-1, 0)
    return mixed.contiguous(memory_format=torch.channels_last)


def softened_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy between softened probabilities, times the squared temperature.

    The factor keeps the size of the gradients about the same at all temperatures.

    Args:
        logits: (B, classes), the model's.
        wanted: (B, classes), the teacher's.
        temperature: The logits are divided by it.

    Returns:
        A scalar.
    """
    target = F.softmax(wanted.float() / temperature, 1)
    return temperature**2 * F.cross_entropy(logits.float() / temperature, target)
