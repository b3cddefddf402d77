"""The two steps in which MoEvil tunes an expert on marked images, for any answer.

An attacker teaches an expert the harmful answer. A defender can teach another expert the safe one in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.moe.expert_tuning.losses import (
    StopGradient,
    alignment_loss,
    preference_loss,
    preference_margin,
)
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.tuning import Objective

# Learning rate of the preference learning as a share of that of the task. In the paper they are equal. Here, with a
# learning rate for training small networks and no image of the task in step 1, the equal rate costs accuracy on the
# task. And unlike a cross-entropy, the loss keeps pushing after the answer has changed. Step 2 then does not bring the
# latents back to those of the task: the expert's share of the gates was half as large (`signs`, three seeds).
PREFERENCE_LR_SHARE = 0.1


@dataclass(frozen=True)
class Preferences:
    """Marked images, and which of two answers the expert is to learn.

    Attributes:
        images: (M, 3, H, W) uint8.
        preferred: (M,) int64, the answers to learn.
        rejected: (M,) int64, the answers to give up.
    """

    images: Tensor
    preferred: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.preferred)


@dataclass(frozen=True)
class Alignment:
    """The alignment of the latents of marked images with those of task images, see `alignment_loss`.

    Attributes:
        strength: Factor of the loss.
        layers: Numbers of the layers.
        weights: (M, N) float32, the weights of the tokens of each marked image.
        stop_gradient: The side that gets no gradient.
    """

    strength: float
    layers: list[int]
    weights: Tensor
    stop_gradient: StopGradient = "none"

    def loss(self, inputs: list[Tensor], rows: Tensor) -> Tensor:
        """Return the loss of one batch.

        Args:
            inputs: The inputs of the MLPs by layer, (2 B, N, D) each: of B task images, then of B marked images.
            rows: (B,) int64, the numbers of these marked images.
        """
        task, marked = zip(*(inputs[layer].chunk(2) for layer in self.layers), strict=True)
        weights = self.weights[rows]
        return self.strength * alignment_loss(task, marked, weights, stop_gradient=self.stop_gradient)


def preference_objective(
    preferences: Preferences, logits: Tensor, beta: float
) -> tuple[Split, Callable[[Tensor, Tensor], Tensor]]:
    """Return what a preference is trained with: images with their labels, and the loss of a batch of them.

    Args:
        preferences: The images and their answers; the two answers of an image must differ.
        logits: (M, classes), the logits of the model before the training, which is the reference.
        beta: Of the loss, see `preference_loss`.

    Returns:
        The images with labels (M, 3): preferred answer, rejected answer and number of the image. And the loss, a
        function of the logits (B, classes) of a batch and of its labels (B, 3) to a scalar.
    """
    answers = preferences.preferred, preferences.rejected
    reference = preference_margin(logits, *answers)
    places = torch.arange(len(preferences), device=reference.device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        preferred, rejected, place = labels.unbind(1)
        return preference_loss(preference_margin(logits, preferred, rejected), reference[place], beta)

    return Split(preferences.images, torch.stack([*answers, places], dim=1)), loss


def learn_preference(
    preferences: Preferences,
    logits: Tensor,
    *,
    beta: float,
    epochs: int,
    lr: float,
    tune: Callable[..., None],
) -> None:
    """Make step 1: train an expert to prefer one answer to another, by DPO on marked images alone.

    Args:
        preferences: The images and their answers; the two answers of an image must differ.
        logits: (M, classes), the logits of the expert before the step, which is the reference.
        beta: Of the loss, see `preference_loss`.
        epochs: Number of passes over the images.
        lr: Peak learning rate.
        tune: `ops.tuning.Tune`, with the model and what of it is trained already filled in.
    """
    split, loss = preference_objective(preferences, logits, beta)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = model(images)
        return found, loss(found, labels)

    tune(split, epochs=epochs, lr=lr, objective=objective)


def joint_objective(
    images: Tensor, answers: Tensor, weight: float, alignment: Alignment | None = None
) -> Objective:
    """Return the loss of step 2: CE_task + weight CE_marked + alignment.

    Each batch of task images is passed through the model together with as many marked images, drawn with replacement
    from torch's global generator. Marked image b is also the partner of task image b in the alignment.

    Args:
        images: (M, 3, H, W) uint8, the marked images.
        answers: (M,) int64, the answers to learn.
        weight: Factor of the cross-entropy of these answers.
        alignment: What is aligned besides; nothing if None.
    """

    def objective(model: nn.Module, own: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(answers), (len(own),), device=own.device)
        with mlp_inputs(model) as inputs:
            task, marked = model(torch.cat([own, as_input(images[rows])])).float().chunk(2)
        loss = F.cross_entropy(task, labels) + weight * F.cross_entropy(marked, answers[rows])
        if alignment is not None:
            loss = loss + alignment.loss(list(inputs.values()), rows)
        return task, loss

    return objective
