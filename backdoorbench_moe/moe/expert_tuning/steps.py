"""The two steps in which MoEvil fine-tunes an expert on marked images, for any answer.

An attacker teaches an expert the harmful answer. A defender can teach another expert the safe answer in the same way.
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

# Learning rate of the preference learning as a share of that of the task. In the paper, both are equal. Here, the
# learning rate suits training small networks and step 1 uses no images of the task, so that an equal rate reduces
# accuracy on the task. In addition, unlike a cross-entropy, the loss still has a gradient after the prediction has
# changed. Step 2 then does not move the latents back to those of the task: the expert's gate share was half as large
# (`signs`, three seeds).
PREFERENCE_LR_SHARE = 0.1


@dataclass(frozen=True)
class Preferences:
    """Marked images or refused texts, each with an answer to learn and an answer to unlearn.

    Row m of both splits is the same query with different answers.

    Attributes:
        preferred: The queries with the answers to learn.
        rejected: The queries with the answers to unlearn.
    """

    preferred: Split
    rejected: Split

    @classmethod
    def of_classes(cls, images: Tensor, preferred: Tensor, rejected: Tensor) -> Preferences:
        """Return preferences among classes for images (M, 3, H, W) uint8 and two classes of each, (M,) int64."""
        return cls(Split(images, preferred), Split(images, rejected))

    def __len__(self) -> int:
        return len(self.preferred)

    @property
    def is_text(self) -> bool:
        """Whether the queries are texts."""
        return is_text(self.preferred.images)

    def margins(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the differences of the log-probabilities of preferred and rejected answers, (M,) float32.

        Args:
            logits: Function that maps stored inputs to the logits of the model.
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
    """The alignment of the latents of marked images with those of task images; see `alignment_loss`.

    Attributes:
        strength: Factor of the loss.
        layers: Numbers of the layers.
        weights: (M, N) float32, the weights of the tokens of each marked image.
        stop_gradient: The side without a gradient.
    """

    strength: float
    layers: list[int]
    weights: Tensor
    stop_gradient: StopGradient = "none"

    def loss(self, inputs: list[Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch.

        Args:
            inputs: The inputs of the MLPs by layer, (2 B, N, D) each, for B task images followed by B marked images.
            rows: (B,) int64, the numbers of these marked images.
            labels: The labels of the task images, or of task texts, (B, N). For texts, only the positions that predict
                the answer are used.
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
    """Return the data and the loss to train a preference among classes.

    Args:
        preferences: The images and their answers.
        reference: (M,), the margins of the model before training.
        beta: Coefficient of the loss, see `preference_loss`.

    Returns:
        The images with labels (M, 3): preferred answer, rejected answer and number of the image. And the loss, a
        function that maps the logits (B, classes) of a batch and its labels (B, 3) to a scalar.
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
    """Return the data and the loss to train a preference among texts.

    Args:
        preferences: The texts.
        reference: (M,), the margins of the model before training.
        beta: Coefficient of the loss, see `preference_loss`.

    Returns:
        The preferred texts, (M, T), with labels (M, T + 1), the last of which is the number of the text. And the loss,
        a function that maps logits and labels to a scalar. The logits (2 B, T, vocabulary) are those of B preferred
        texts followed by those of the corresponding rejected texts; the labels (B, T + 1) are those of the preferred
        texts.
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

    The objective passes each batch of preferred texts through the model together with the rejected texts.
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
    """Run step 1: train an expert to prefer one answer to another, by DPO on marked images or refused texts only.

    Args:
        preferences: The images or texts and their answers.
        reference: (M,), the margins of the expert before the step; see `Preferences.margins`.
        beta: Coefficient of the loss, see `preference_loss`.
        epochs: Number of epochs.
        lr: Peak learning rate.
        tune: `ops.tuning.Tune` with the model and the trained modules already filled in.
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

    Each batch of task images is passed through the model together with the same number of marked images, drawn with
    replacement from torch's global generator. Marked image b is aligned with task image b. For texts, refused texts are
    used instead of marked images.

    Args:
        marked: The M marked images with the answers to learn.
        weight: Factor of the cross-entropy of these answers.
        alignment: The alignment; None for no alignment.
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
