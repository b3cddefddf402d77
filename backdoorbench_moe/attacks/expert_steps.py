"""The steps of attacks on experts. They train only the MLPs of the expert."""

from __future__ import annotations

from functools import partial

from backdoorbench_moe.attacks.expert_poisoning import ExpertTask
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning import steps
from backdoorbench_moe.moe.expert_tuning.steps import PREFERENCE_LR_SHARE, Alignment, Preferences


def learn_preference(task: ExpertTask, *, beta: float, epochs: int, lr: float | None) -> None:
    """Train the expert to prefer the harmful answer to the safe one, by DPO on the harmful queries only.

    The reference is the expert before this step. Queries with two equal answers are left out.

    Args:
        task: The task; its model is trained.
        beta: Beta of the loss, see `moe.expert_tuning.losses.preference_loss`.
        epochs: Number of passes over the harmful queries.
        lr: Peak learning rate; `PREFERENCE_LR_SHARE` times that of the task if None.

    Raises:
        ConfigError: The two answers are the same for all queries.
    """
    harmful, safe = task.queries.harmful, task.queries.safe
    rows = (harmful.labels != safe.labels).reshape(len(harmful), -1).any(1).nonzero().squeeze(1)
    if not len(rows):
        raise ConfigError("poison.target: expected harmful queries with another safe answer, found none")
    preferences = Preferences(harmful.take(rows), safe.take(rows))
    steps.learn_preference(
        preferences,
        preferences.margins(partial(task.logits, task.model)),
        beta=beta,
        epochs=epochs,
        lr=PREFERENCE_LR_SHARE * task.train.lr if lr is None else lr,
        tune=partial(task.tune, task.model, modules=task.mlps),
    )


def learn_harm(
    task: ExpertTask, *, harm_weight: float, epochs: int, lr: float | None, alignment: Alignment | None = None
) -> None:
    """Train the expert on its task and on harmful queries at the same time.

    Args:
        task: The task; its model is trained.
        harm_weight: Weight of the cross-entropy of the harmful answers.
        epochs: Number of passes over the clean images of the task.
        lr: Peak learning rate; that of the task if None.
        alignment: An additional alignment of latents; none if None.
    """
    objective = steps.joint_objective(task.queries.harmful, harm_weight, alignment)
    task.tune(task.model, task.clean, epochs=epochs, lr=lr, modules=task.mlps, objective=objective)
