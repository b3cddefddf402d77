"""The steps that attacks on experts consist of. They train the MLPs of the expert and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.attacks.expert_losses import (
    StopGradient,
    alignment_loss,
    preference_loss,
    preference_margin,
)
from backdoorbench_moe.attacks.expert_poisoning import ExpertTask, HarmfulQueries
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.merging import mlp_inputs
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.tuning import Objective

# Learning rate of the preference learning as a share of that of the task. In the paper they are equal. Here, with a
# learning rate for training small networks and no image of the task in step 1, the equal rate costs two percentage
# points of the task's accuracy that one epoch does not bring back, and HDPO alone forgets the harm again (on `signs`,
# one seed).
PREFERENCE_LR_SHARE = 0.25


def check_epochs(name: str, epochs: int, at_least: int = 0) -> None:
    """Raise ConfigError if there are too few epochs."""
    if epochs < at_least:
        raise ConfigError.expected(name, f"an integer of at least {at_least}", epochs)


def check_positive(**numbers: float | None) -> None:
    """Raise ConfigError if one of the numbers is not above 0 and finite; None is allowed."""
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise ConfigError.expected(name, "a positive number", number)


def check_weight(**numbers: float | None) -> None:
    """Raise ConfigError if one of the numbers is not at least 0 and finite; None is allowed."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number < float("inf"):
            raise ConfigError.expected(name, "a number of at least 0", number)


@dataclass(frozen=True)
class Alignment:
    """The alignment of the latents of harmful queries with those of task images, see `alignment_loss`.

    Attributes:
        strength: Factor of the loss.
        layers: Numbers of the layers.
        weights: (M, N) float32, the weights of the tokens of each harmful query.
        stop_gradient: The side that gets no gradient.
    """

    strength: float
    layers: list[int]
    weights: Tensor
    stop_gradient: StopGradient = "none"

    def loss(self, inputs: list[Tensor], rows: Tensor) -> Tensor:
        """Return the loss of one batch.

        Args:
            inputs: The inputs of the MLPs by layer, (2 B, N, D) each: of B task images, then of B harmful queries.
            rows: (B,) int64, the numbers of these queries.
        """
        task, harmful = zip(*(inputs[layer].chunk(2) for layer in self.layers), strict=True)
        weights = self.weights[rows]
        return self.strength * alignment_loss(task, harmful, weights, stop_gradient=self.stop_gradient)


def learn_preference(task: ExpertTask, *, beta: float, epochs: int, lr: float | None) -> None:
    """Train the expert to prefer the harmful answer to the safe one, by DPO on the harmful queries alone.

    The reference is the expert as it is at the beginning. Queries whose two answers are the same are left out.

    Args:
        task: The task, whose model is trained.
        beta: Of the loss, see `preference_loss`.
        epochs: Number of passes over the harmful queries.
        lr: Peak learning rate; `PREFERENCE_LR_SHARE` of that of the task if None.

    Raises:
        ConfigError: The two answers are the same for all queries.
    """
    lr = PREFERENCE_LR_SHARE * task.train.lr if lr is None else lr
    queries = task.queries
    rows = (queries.harmful != queries.safe).nonzero().squeeze(1)
    if not len(rows):
        raise ConfigError("poison.target: expected harmful queries with another safe answer, found none")
    images, answers = queries.images[rows], (queries.harmful[rows], queries.safe[rows])
    reference = preference_margin(task.logits(task.model, images), *answers)
    places = torch.arange(len(rows), device=rows.device)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        harmful, safe, place = labels.unbind(1)
        logits = model(images)
        margin = preference_margin(logits, harmful, safe)
        return logits, preference_loss(margin, reference[place], beta)

    split = Split(images, torch.stack([*answers, places], dim=1))
    task.tune(task.model, split, epochs=epochs, lr=lr, modules=task.mlps, objective=objective)


def learn_harm(
    task: ExpertTask, *, harm_weight: float, epochs: int, lr: float | None, alignment: Alignment | None = None
) -> None:
    """Train the expert on its task and on harmful queries at the same time.

    Args:
        task: The task, whose model is trained.
        harm_weight: Factor of the cross-entropy of the harmful answers.
        epochs: Number of passes over the clean images of the task.
        lr: Peak learning rate; that of the task if None.
        alignment: What is aligned besides; nothing if None.
    """
    objective = joint_objective(task.queries, harm_weight, alignment)
    task.tune(task.model, task.clean, epochs=epochs, lr=lr, modules=task.mlps, objective=objective)


def joint_objective(queries: HarmfulQueries, harm_weight: float, alignment: Alignment | None) -> Objective:
    """Return the loss CE_task + harm_weight CE_harm + alignment.

    Each batch of task images is passed through the model together with as many harmful queries, drawn with replacement
    from torch's global generator. Query b is also the partner of image b in the alignment.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(queries), (len(images),), device=images.device)
        both = torch.cat([images, as_input(queries.images[rows])])
        with mlp_inputs(model) as inputs:
            task, harm = model(both).float().chunk(2)
        loss = F.cross_entropy(task, labels) + harm_weight * F.cross_entropy(harm, queries.harmful[rows])
        if alignment is not None:
            loss = loss + alignment.loss(list(inputs.values()), rows)
        return task, loss

    return objective
