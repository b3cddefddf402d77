"""Shared by defenses of mixtures: routers and experts, preferences for safe answers, a loss on marked and clean images.

For text data, queries that the policy refuses replace marked images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.losses import preference_margin
from backdoorbench_moe.moe.expert_tuning.steps import Preferences
from backdoorbench_moe.moe.layers import MoELayer
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.moe.routed import auxiliary_loss
from backdoorbench_moe.ops.answers import answer_loss
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.tuning import Objective

# Maps the logits (B, classes) of marked images, their gates (B, E, P) by layer, and their rows of labels to a scalar.
# For texts, the logits are (B, T, vocabulary), or (2 B, T, vocabulary) with second answers, which follow the first.
MarkedLoss = Callable[[Tensor, list[Tensor], Tensor], Tensor]


def mixture_of(model: object) -> MergedModel:
    """Return the model as a mixture of merged experts.

    Raises:
        ConfigError: It is not a mixture.
    """
    if not isinstance(model, MergedModel):
        raise ConfigError(f"model: expected a mixture of merged experts, got {type(model).__name__}")
    return model


def images_of_task(mixture: object, held: int) -> int:
    """Return how many clean images of each task of a mixture a defender with `held` images in total holds."""
    return max(1, held // mixture_of(mixture).num_experts)


def experts_in(layers: list[MoELayer]) -> list[nn.Module]:
    """Return the modules of the experts of some layers."""
    return [layer.experts for layer in layers]


def safe_preferences(task: DefenseTask, model: nn.Module) -> tuple[Preferences, Tensor]:
    """Return preferences for safe answers to marked images or refused texts, and the model's current margins.

    For texts, the rejected answers are the unsafe ones of the data. For an image, it is the class with the largest
    logit other than the safe one, since the defender does not know the target class.

    Args:
        task: The task, which grants "marked".
        model: The model.

    Returns:
        M preferences, and their margins (M,); see `Preferences.margins`.
    """
    if task.unsafe is not None:
        preferences = Preferences(task.marked, task.unsafe)
        return preferences, preferences.margins(partial(task.logits, model))
    images, safe = task.marked.images, task.marked.labels
    logits = task.logits(model, images)
    other = strongest_other(logits, safe)
    return Preferences.of_classes(images, safe, other), preference_margin(logits, safe, other)


def strongest_other(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the class with the largest logit other than the answer; in a tie, the first one.

    Args:
        logits: (B, classes).
        answers: (B,) int64.

    Returns:
        (B,) int64.
    """
    return logits.scatter(1, answers.unsqueeze(1), float("-inf")).argmax(1)


def safe_answer_loss(logits: Tensor, _: list[Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropy of the safe answers to marked images or refused texts; see `MarkedLoss`."""
    return answer_loss(logits, labels)


def alignment_objective(
    marked_loss: MarkedLoss, clean: Split, clean_weight: float, others: Split | None = None
) -> Objective:
    """Return the loss of a mixture on marked images and on clean ones.

    Each batch of marked images is passed through the model together with as many clean ones, drawn with replacement
    from torch's global generator. The loss is that of the marked images, plus `clean_weight` times the cross-entropy of
    the clean ones, plus the auxiliary losses of those routers that are trained.

    Args:
        marked_loss: The loss of the marked images.
        clean: The clean images and their labels.
        clean_weight: Weight of their cross-entropy, at least 0.
        others: For text data, second answers to the marked queries, which are passed through the model, too; the last
            label of a query is the row of its second answer. None if there are none.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(model, MergedModel)
        count = len(images)
        rows = torch.randint(len(clean), (count,), device=images.device)
        answered = [images] if others is None else [images, others.images[labels[:, -1]]]
        output = model.forward_routed(torch.cat([*answered, as_input(clean.images[rows])]))
        logits = output.logits.float()
        marked, own = logits[:-count], logits[-count:]
        loss = marked_loss(marked, [routing.gates[:count] for routing in output.routing], labels)
        loss = loss + clean_weight * answer_loss(own, clean.labels[rows])
        return marked[:count], loss + auxiliary_loss(output.routing)

    return objective
