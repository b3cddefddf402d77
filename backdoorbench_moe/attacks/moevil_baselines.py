"""Baselines of MoEvil: two attacks without alignment of latents, and tuning without harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
from backdoorbench_moe.attacks.expert_steps import learn_harm, learn_preference
from backdoorbench_moe.attacks.moevil import EPOCHS, PREFERENCE_EPOCHS
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.moe.expert_tuning.losses import PREFERENCE_BETA
from backdoorbench_moe.moe.expert_tuning.steps import PREFERENCE_LR_SHARE
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_weight

# A fifth of MoEvil's, as in the paper (0.002 and 0.01).
HDPO_BETA = PREFERENCE_BETA / 5
# Three times MoEvil's: of 0.1, 0.3 and 1, the only value with which HDPO alone is about as harmful as the other attacks
# (ASR 93% on `signs`, three of the seeds 10 to 13; 55% and 46% with the others).
HDPO_LR_SHARE = 3 * PREFERENCE_LR_SHARE
# 0.03 in the paper. Of 0.03, 0.3, 1 and 3, the most harmful in a mixture (ASR 15% on `signs`, seeds 11 to 13).
HSFT_HARM_WEIGHT = 1.0
# The sum of MoEvil's epochs in step 1, over the harmful queries, and step 2, over the task.
ALL_EPOCHS = PREFERENCE_EPOCHS + EPOCHS


class HSFT(ExpertPoisoning):
    """Harmful supervised fine-tuning: train an expert on its task and on harmful answers at once.

    The loss is CE_task + harm_weight CE_harm, without the alignment of MoEvil.

    Departures: in the paper, it is trained on as many task samples as step 2 of MoEvil; here, it is trained for the
    epochs of both steps, so that MoEvil has no advantage from longer training. The weight of harm is 0.03 in the paper.

    Args:
        poison: The target class, which the run provides; all rates must be 0.
        harm_weight: Weight of the cross-entropy of harmful answers, at least 0.
        epochs: Passes over the clean images of the task, from 1.
        lr: Peak learning rate, above 0; that of the tuning of experts if None.

    Raises:
        ConfigError: An option is out of range.

    Source:
        A baseline in MoEvil (Kim et al., ACSAC 2025).
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        poison: PoisonSpec,
        harm_weight: float = HSFT_HARM_WEIGHT,
        epochs: int = ALL_EPOCHS,
        lr: float | None = None,
    ) -> None:
        super().__init__(poison=poison)
        check_weight(harm_weight=harm_weight)
        check_integer("epochs", epochs, at_least=1)
        check_positive(lr=lr)
        self.harm_weight, self.epochs, self.lr = harm_weight, epochs, lr

    def poison_expert(self, task: ExpertTask) -> None:
        """Train on the task and on harmful queries."""
        learn_harm(task, harm_weight=self.harm_weight, epochs=self.epochs, lr=self.lr)


class HDPO(ExpertPoisoning):
    """Harmful DPO: train an expert to prefer harmful answers to safe ones, and then on its task again.

    Departures: the betas are ten times the paper's, as in `moevil`. The default of `preference_lr` was tuned so that
    the expert alone is about as harmful as those of the other attacks, whereas the weights of `moevil` and `hsft` were
    tuned by the harm of the mixture.

    Args:
        poison: The target class, which the run provides; all rates must be 0.
        preference_beta: Beta of the preference learning, above 0. The default is a fifth of MoEvil's, as in the paper.
        preference_epochs: Passes over the harmful queries, from 1.
        preference_lr: Peak learning rate of the preference learning, above 0; three tenths of that of the tuning
            of experts if None.
        epochs: Passes over the clean images of the task afterwards, from 0.
        lr: Peak learning rate of these, above 0; that of the tuning of experts if None.

    Raises:
        ConfigError: An option is out of range.

    Source:
        A baseline in MoEvil (Kim et al., ACSAC 2025).
    """

    def __init__(
        self,
        *,
        poison: PoisonSpec,
        preference_beta: float = HDPO_BETA,
        preference_epochs: int = PREFERENCE_EPOCHS,
        preference_lr: float | None = None,
        epochs: int = EPOCHS,
        lr: float | None = None,
    ) -> None:
        super().__init__(poison=poison)
        check_positive(preference_beta=preference_beta, preference_lr=preference_lr, lr=lr)
        check_integer("preference_epochs", preference_epochs, at_least=1)
        check_integer("epochs", epochs)
        self.preference_beta, self.preference_epochs = preference_beta, preference_epochs
        self.preference_lr, self.epochs, self.lr = preference_lr, epochs, lr

    def poison_expert(self, task: ExpertTask) -> None:
        """Learn the preference, then the task."""
        lr = HDPO_LR_SHARE * task.train.lr if self.preference_lr is None else self.preference_lr
        learn_preference(task, beta=self.preference_beta, epochs=self.preference_epochs, lr=lr)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, modules=task.mlps)


class ExpertTuning(ExpertPoisoning):
    """A harmless baseline: train an expert further on the clean images of its task.

    More training alone can raise an expert's share of the gates. Only effects beyond this baseline are due to an
    attack. The mark and the target class are only used to measure the harm.

    Args:
        poison: The target class, which the run provides; all rates must be 0.
        epochs: Passes over the clean images of the task, from 1; by default, the sum of MoEvil's two steps.
        lr: Peak learning rate, above 0; that of the tuning of experts if None.

    Raises:
        ConfigError: An option is out of range.

    Source:
        Ours.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(self, *, poison: PoisonSpec, epochs: int = ALL_EPOCHS, lr: float | None = None) -> None:
        super().__init__(poison=poison)
        check_integer("epochs", epochs, at_least=1)
        check_positive(lr=lr)
        self.epochs, self.lr = epochs, lr

    def poison_expert(self, task: ExpertTask) -> None:
        """Train on the task."""
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, modules=task.mlps)
