"""Defensive expert: the two steps of MoEvil with safe instead of harmful answers, on another expert."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.mixtures import images_of_task, mixture_of, safe_preferences
from backdoorbench_moe.defenses.routers import reset_routers, router_lr
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.latents import FIRST_TOKENS, Layers, choose_layers
from backdoorbench_moe.moe.expert_tuning.losses import PREFERENCE_BETA, decisive_margin
from backdoorbench_moe.moe.expert_tuning.steps import (
    PREFERENCE_LR_SHARE,
    Alignment,
    joint_objective,
    learn_preference,
)
from backdoorbench_moe.moe.experts import active_experts
from backdoorbench_moe.moe.merging import MergedModel, only_expert
from backdoorbench_moe.ops.answers import first_positions, mean_weights
from backdoorbench_moe.ops.images import batches, concatenate
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_weight


class DefensiveExpert(Defense):
    """Tune one expert so that gates send marked images to it and it answers them safely; then train new gates.

    The two steps are those of the attack `moevil`, with the safe answer, the class "reject", instead of the harmful
    one. Step 1 is preference learning on marked images: the unsafe answer to an image is the class with the largest
    logit of the expert other than the safe one, since the provider does not know the target class. Step 2 trains the
    expert on its task with the loss CE_task + safe_weight CE_safe - similarity cos, where the latents of marked images
    are means over all tokens, since the provider does not know which tokens the mark changes. Only the weights of this
    expert are trained, and all tokens are sent to it. Then all routers are re-initialised and trained on clean images
    of all tasks, as in `router-reset`.

    The judgement's scores are the shares of marked images, in percent, that each expert alone does not answer safely
    before the defense. A provider can measure them without knowing the attack.

    For text data, training queries that the policy refuses replace marked images, and the unsafe answers are those of
    the data. The latents of such a query are averaged over the positions that emit the first 4 tokens of the safe
    answer; those of the task over the positions that emit its answer. An expert answers a query safely if, at the first
    position where the two answers differ, the token of the safe one has the larger logit; so the scores do not depend
    on the lengths of the answers.

    Departures: the weights of the safe answers and of the cosine are those of the attack `moevil` in this package,
    which are larger than the paper's. In the paper, the defensive expert is chosen by hand; here, `expert` may be None.

    Args:
        expert: Number of the expert, from 0. If None, the one that alone answers most marked images safely, which is
            the least likely to be poisoned; in a tie, the first one. Experts that an earlier defense has muted or
            masked in all layers are not chosen.
        preference_beta: Beta of step 1, above 0.
        preference_epochs: Passes of step 1 over the marked images, from 0; with 0, step 1 is skipped.
        preference_lr: Peak learning rate of step 1, above 0; a tenth of that of the tuning of experts if None.
        safe_weight: Weight of the cross-entropy of safe answers in step 2, at least 0.
        similarity: Weight of the cosine in step 2, at least 0.
        layers: Layers whose latents are aligned: "all", "first-quarter", "second-quarter", "first-half",
            "second-half", or their numbers. The first layer, number 0, is never used, since its input cannot change.
        epochs: Passes of step 2 over the clean images of the expert's task, from 1.
        lr: Peak learning rate of step 2, above 0; that of the tuning of experts if None.
        gate_epochs: Passes over the clean images of all tasks to train the new gates, from 1.
        gate_lr: Peak learning rate of the gates, above 0; that of the run's gates if None.
        clean_fraction: Number of clean images that the defender holds, as a share of the training images, in (0, 1],
            divided equally among the tasks. The number of marked images is the same.

    Raises:
        ConfigError: A value is out of range; the model is not a mixture, or does not have the expert or the layers.

    Source:
        MoEvil (Kim et al., ACSAC 2025), section on defenses.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tasks", "marked"})
    takes_texts: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, object]] = {"preference_epochs": 1, "epochs": 1, "gate_epochs": 1}

    def __init__(
        self,
        *,
        expert: int | None = None,
        preference_beta: float = PREFERENCE_BETA,
        preference_epochs: int = 5,
        preference_lr: float | None = None,
        safe_weight: float = 3.0,
        similarity: float = 0.5,
        layers: Layers = "all",
        epochs: int = 10,
        lr: float | None = None,
        gate_epochs: int = 5,
        gate_lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_positive(preference_beta=preference_beta, preference_lr=preference_lr, lr=lr, gate_lr=gate_lr)
        check_weight(safe_weight=safe_weight, similarity=similarity)
        check_integer("preference_epochs", preference_epochs)
        check_integer("epochs", epochs, at_least=1)
        check_integer("gate_epochs", gate_epochs, at_least=1)
        self.expert, self.layers = expert, layers
        self.preference_beta, self.preference_epochs = preference_beta, preference_epochs
        self.preference_lr, self.safe_weight, self.similarity = preference_lr, safe_weight, similarity
        self.epochs, self.lr, self.gate_epochs, self.gate_lr = epochs, lr, gate_epochs, gate_lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model is not a mixture, or does not have the expert or the layers."""
        mixture = mixture_of(model)
        if self.expert is not None and not 0 <= self.expert < mixture.num_experts:
            raise ConfigError.expected("expert", f"a number in 0..{mixture.num_experts - 1}", self.expert)
        choose_layers(self.layers, len(mixture.layers()))

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Evaluate every expert on the marked images, tune one of them in two steps, and train the gates.

        Step 2 passes a marked image with each image of the expert's task.
        """
        experts = mixture_of(model).num_experts
        each = images_of_task(model, held)
        tuned = self.preference_epochs * held + 2 * self.epochs * each + self.gate_epochs * experts * each
        return Cost(trained=tuned, predicted=(experts + bool(self.preference_epochs)) * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Choose the expert, tune it, and train new gates."""
        mixture = mixture_of(task.model)
        unsafe = [unsafe_share(task, mixture, number) for number in range(mixture.num_experts)]
        if (chosen := self.expert) is None:
            active = sorted({expert.index for expert in active_experts(mixture, mixture.experts())})
            chosen = min(active, key=unsafe.__getitem__)
        with only_expert(mixture, chosen):
            self._tune_expert(task, mixture, chosen)
        task.report("expert tuned", mixture)
        reset_routers(task)
        task.tune(
            mixture,
            concatenate(task.tasks),
            epochs=self.gate_epochs,
            lr=router_lr(task, self.gate_lr),
            modules=mixture.routers(),
        )
        judged = Judgement(
            "expert",
            "share of marked images, in percent, that the expert alone does not answer safely",
            scores={str(number): share for number, share in enumerate(unsafe)},
            details={"defensive": chosen},
        )
        return DefenseResult("gates trained", mixture, (judged,))

    def _tune_expert(self, task: DefenseTask, mixture: MergedModel, number: int) -> None:
        """Run both steps on the only expert to which the mixture sends tokens."""
        rows = {
            name: own
            for expert in mixture.experts()
            if expert.index == number
            for name, own in expert.own.items()
        }
        tune = partial(task.tune, mixture, rows=rows)
        if self.preference_epochs:
            preferences, reference = safe_preferences(task, mixture)
            lr = PREFERENCE_LR_SHARE * task.train.lr if self.preference_lr is None else self.preference_lr
            learn_preference(
                preferences,
                reference,
                beta=self.preference_beta,
                epochs=self.preference_epochs,
                lr=lr,
                tune=tune,
            )
        objective = joint_objective(task.marked, self.safe_weight, self._alignment(task, mixture))
        tune(task.tasks[number], epochs=self.epochs, lr=self.lr, objective=objective)

    def _alignment(self, task: DefenseTask, mixture: MergedModel) -> Alignment | None:
        """Return the alignment of the latents; None if its weight is 0."""
        if not self.similarity:
            return None
        layers = choose_layers(self.layers, len(mixture.layers()))
        return Alignment(self.similarity, layers, _weights(task, mixture))


def _weights(task: DefenseTask, mixture: MergedModel) -> Tensor:
    """Return equal weights for all tokens of marked images, or the first ones of the safe answers to texts, (M, N)."""
    safe = task.marked.labels
    if task.unsafe is not None:
        return mean_weights(first_positions(safe, FIRST_TOKENS))
    rows, columns = mixture.patch_grid
    tokens = mixture.layers()[0].num_prefix_tokens + rows * columns
    return torch.full((len(safe), tokens), 1 / tokens, device=safe.device)


def unsafe_share(task: DefenseTask, mixture: MergedModel, number: int) -> float:
    """Return the share of marked images or refused texts, in percent, that one expert alone does not answer safely."""
    marked, unsafe = task.marked, task.unsafe
    with only_expert(mixture, number):
        if unsafe is None:
            safely = task.logits(mixture, marked.images).argmax(1) == marked.labels
        else:
            pairs = zip(batches(marked), batches(unsafe), strict=True)
            margins = [
                decisive_margin(task.logits(mixture, own.images), own.labels, other.labels)
                for own, other in pairs
            ]
            safely = torch.cat(margins) > 0
    return 100 * (~safely).double().mean().item()
