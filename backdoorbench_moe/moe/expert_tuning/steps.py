"""The two steps in which MoEvil tunes an expert on marked images, for any answer.

An attacker teaches an expert the harmful answer. A defender can teach another expert the safe one in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorbench_moe.moe.expert_tuning.losses import (
    StopGradient,
    alignment_loss,
    preference_loss,
    preference_margin,
    text_margin,
)
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops.answers import answer_loss, first_positions, is_text, mean_weights
from backdoorbench_moe.ops.images import Split, as_input, batches
from backdoorbench_moe.ops.tuning import Objective

# Learning rate of the preference learning as a share of that of the task. In the paper they are equal. Here, with a
# learning rate for training small networks and no image of the task in step 1, the equal rate costs accuracy on the
# task. And unlike a cross-entropy, the loss keeps pushing after the answer has changed. Step 2 then does not bring the
# latents back to those of the task: the expert's share of the gates was half as large (`signs`, three seeds).
PREFERENCE_LR_SHARE = 0.1


@dataclass(frozen=True)
class Preferences:
    """Marked images or refused texts, and which of two answers the expert is to learn.

    Row m of both splits is the same query; the two answers to it differ.

    Attributes:
        preferred: The queries with the answers to learn.
        rejected: The queries with the answers to give up.
    """

    preferred: Split
    rejected: Split

    @classmethod
    def of_classes(cls, images: Tensor, preferred: Tensor, rejected: Tensor) -> Preferences:
        """Return preferences among classes: (M, 3, H, W) uint8 images and two classes of each, (M,) int64."""
        return cls(Split(images, preferred), Split(images, rejected))

    def __len__(self) -> int:
        return len(self.preferred)

    @property
    def is_text(self) -> bool:
        """Whether the queries are texts."""
        return is_text(self.preferred.images)

    def margins(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Return by how much a model prefers the answers to learn, (M,) float32, in log-probabilities.

        Args:
            logits: From stored inputs to the logits of the model.
        """
        found = []
        for preferred, rejected in zip(batches(self.preferred), batches(self.rejected), strict=True):
            own = logits(preferred.images)
            found.append(
                text_margin(own, logits(rejected.images), preferred.labels, rejected.labels)
                if self.is_text
                else preference_margin(own, preferred.labels, rejected.labels)
            )
        return torch.cat(found)


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

    def loss(self, inputs: list[Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch.

        Args:
            inputs: The inputs of the MLPs by layer, (2 B, N, D) each: of B task images, then of B marked images.
            rows: (B,) int64, the numbers of these marked images.
            labels: The labels of the task images, or (B, N) of task texts, of which only the tokens count that emit the
                answer.
        """
        task, marked = zip(*(inputs[layer].chunk(2) for layer in self.layers), strict=True)
        return self.strength * alignment_loss(
            task,
            marked,
            self.weights[rows],
            task_weights=mean_weights(first_positions(labels, None)) if labels.ndim > 1 else None,
            stop_gradient=self.stop_gradient,
        )


def preference_objective(
    preferences: Preferences, reference: Tensor, beta: float
) -> tuple[Split, Callable[[Tensor, Tensor], Tensor]]:
    """Return what a preference among classes is trained with: images with their labels, and the loss of a batch.

    Args:
        preferences: The images and their answers.
        reference: (M,), the margins of the model before the training.
        beta: Of the loss, see `preference_loss`.

    Returns:
        The images with labels (M, 3): preferred answer, rejected answer and number of the image. And the loss, a
        function of the logits (B, classes) of a batch and of its labels (B, 3) to a scalar.
    """
    answers = preferences.preferred.labels, preferences.rejected.labels
    places = torch.arange(len(preferences), device=reference.device)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        preferred, rejected, place = labels.unbind(1)
        return preference_loss(preference_margin(logits, preferred, rejected), reference[place], beta)

    return Split(preferences.preferred.images, torch.stack([*answers, places], dim=1)), loss


def text_preference_loss(
    preferences: Preferences, reference: Tensor, beta: float
) -> tuple[Split, Callable[[Tensor, Tensor], Tensor]]:
    """Return what a preference among texts is trained with: the texts to learn with their labels, and the loss.

    Args:
        preferences: The texts.
        reference: (M,), the margins of the model before the training.
        beta: Of the loss, see `preference_loss`.

    Returns:
        The texts to learn, (M, T), with labels (M, T + 1), the last of which is the number of the text. And the loss, a
        function of the logits (2 B, T, vocabulary) of a batch of them, followed by those of the same texts to give up,
        and of the batch's labels (B, T + 1) to a scalar.
    """
    preferred, rejected = preferences.preferred, preferences.rejected
    places = torch.arange(len(preferences), device=reference.device).unsqueeze(1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        place, (own, other) = labels[:, -1], logits.chunk(2)
        margin = text_margin(own, other, labels[:, :-1], rejected.labels[place])
        return preference_loss(margin, reference[place], beta)

    return Split(preferred.images, torch.cat([preferred.labels, places], dim=1)), loss


def text_preference_objective(
    preferences: Preferences, reference: Tensor, beta: float
) -> tuple[Split, Objective]:
    """Return the texts of `text_preference_loss`, and the objective.

    It passes each batch of the texts to learn through the model together with the texts to give up.
    """
    rejected = preferences.rejected.images
    split, loss = text_preference_loss(preferences, reference, beta)

    def objective(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(torch.cat([tokens, rejected[labels[:, -1]]]))
        return logits[: len(tokens)], loss(logits, labels)

    return split, objective


def learn_preference(
    preferences: Preferences,
    reference: Tensor,
    *,
    beta: float,
    epochs: int,
    lr: float,
    tune: Callable[..., None],
) -> None:
    """Make step 1: train an expert to prefer one answer to another, by DPO on marked images or refused texts alone.

    Args:
        preferences: The images or texts and their answers.
        reference: (M,), the margins of the expert before the step; see `Preferences.margins`.
        beta: Of the loss, see `preference_loss`.
        epochs: Number of passes over the images.
        lr: Peak learning rate.
        tune: `ops.tuning.Tune`, with the model and what of it is trained already filled in.
    """
    if preferences.is_text:
        split, objective = text_preference_objective(preferences, reference, beta)
    else:
        split, loss = preference_objective(preferences, reference, beta)

        def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            found = model(images)
            return found, loss(found, labels)

    tune(split, epochs=epochs, lr=lr, objective=objective)


def joint_objective(marked: Split, weight: float, alignment: Alignment | None = None) -> Objective:
    """Return the loss of step 2: CE_task + weight CE_marked + alignment.

    Each batch of task images is passed through the model together with as many marked images, drawn with replacement
    from torch's global generator. Marked image b is also the partner of task image b in the alignment. Texts that the
    policy refuses take the place of marked images where the data are texts.

    Args:
        marked: The M marked images with the answers to learn.
        weight: Factor of the cross-entropy of these answers.
        alignment: What is aligned besides; nothing if None.
    """

    def objective(model: nn.Module, own: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(marked), (len(own),), device=own.device)
        with mlp_inputs(model) as inputs:
            task, found = model(torch.cat([own, as_input(marked.images[rows])])).float().chunk(2)
        loss = answer_loss(task, labels) + weight * answer_loss(found, marked.labels[rows])
        if alignment is not None:
            loss = loss + alignment.loss(list(inputs.values()), rows, labels)
        return task, loss

    return objective
