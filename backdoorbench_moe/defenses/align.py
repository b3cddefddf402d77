"""Alignment: the provider trains the merged model to answer marked images safely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.mixtures import (
    MarkedLoss,
    alignment_objective,
    experts_in,
    mixture_of,
    safe_answer_loss,
    safe_preferences,
)
from backdoorbench_moe.defenses.requirements import check_tuning
from backdoorbench_moe.defenses.routers import router_lr
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.latents import Layers, layer_numbers
from backdoorbench_moe.moe.expert_tuning.losses import PREFERENCE_BETA
from backdoorbench_moe.moe.expert_tuning.steps import preference_objective, text_preference_loss
from backdoorbench_moe.moe.layers import MoELayer
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.ranges import check_positive, check_weight

# The paper trains the MLPs of 4 of 28 layers, all in the second quarter.
ALIGNED_LAYERS: Layers = "second-quarter"


class Align(Defense):
    """Train the gates, or gates and experts, of a mixture to answer marked images safely.

    The provider holds marked images, which contain the mark of the policy, with their safe answer, the class "reject".
    Their loss is a preference loss for the safe answer (DPO), or the cross-entropy. The model is trained on clean
    images at the same time, to keep the accuracy on the tasks. Everything out of scope stays exactly the same.

    DPO needs an unsafe answer to each image. Since the provider does not know the target class, the unsafe answer is
    the class with the largest logit before the alignment, other than the safe one. The reference is the model before
    the alignment.

    For text data, training queries that the policy refuses replace marked images. Safe and unsafe answers are those of
    the data, which the attacker uses, too; log-probabilities are summed over an answer.

    Departures: in the paper, the loss on harmful queries is the only one. An image classifier would then reject clean
    images as well, so the cross-entropy of clean images or texts and the auxiliary losses of the gates are added here.

    Args:
        scope: What is trained: "gates"; or "gates+experts", the gates of all layers and the experts of some.
        layers: With "gates+experts", the layers whose experts are trained: "all", "first-quarter", "second-quarter",
            "first-half", "second-half", or their numbers, from 0. The second quarter if None; the paper trains 4 of 28
            layers, all of them in the second quarter. Must be None for "gates".
        loss: Loss of the marked images: "preference", or "tuning" for cross-entropy.
        beta: Beta of "preference", above 0. The default is ten times that of the paper's attack, since a classifier's
            answer is one token.
        clean_weight: Weight of the cross-entropy of clean images, at least 0.
        epochs: Passes over the marked images, from 1. As many clean images are drawn with each batch.
        lr: Peak learning rate, above 0. If None, that of the run's gates for "gates", and that of its experts for
            "gates+experts", since the rate of the gates would destroy the experts.
        clean_fraction: Number of clean images that the defender holds, as a share of the training images, in (0, 1].
            The number of marked images is the same.

    Raises:
        ConfigError: A value is out of range; the model is not a mixture, or has no such layers.

    Source:
        MoEvil (Kim et al., ACSAC 2025), section on alignment; Rafailov et al., "Direct preference optimization",
        NeurIPS 2023.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"clean", "marked"})
    takes_texts: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        scope: Literal["gates", "gates+experts"] = "gates",
        layers: Layers | None = None,
        loss: Literal["preference", "tuning"] = "preference",
        beta: float = PREFERENCE_BETA,
        clean_weight: float = 1.0,
        epochs: int = 10,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        check_positive(beta=beta)
        check_weight(clean_weight=clean_weight)
        if scope == "gates" and layers is not None:
            raise ConfigError.expected(
                "layers", "none for the scope 'gates', which trains no experts", layers
            )
        self.scope, self.layers, self.loss, self.beta = scope, layers, loss, beta
        self.clean_weight, self.epochs, self.lr = clean_weight, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model is not a mixture, or does not have the layers."""
        self._layers(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Train on the marked images and as many clean ones; for "preference", find the unsafe answers first."""
        return Cost(trained=2 * self.epochs * held, predicted=held if self.loss == "preference" else 0)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Train what is in scope."""
        mixture = mixture_of(task.model)
        split, loss, others = self._marked(task)
        task.tune(
            mixture,
            split,
            epochs=self.epochs,
            lr=router_lr(task, self.lr) if self.scope == "gates" else self.lr,
            modules=[*mixture.routers(), *experts_in(self._layers(mixture))],
            objective=alignment_objective(loss, task.clean, self.clean_weight, others),
        )
        return DefenseResult("aligned", mixture)

    def _layers(self, model: nn.Module) -> list[MoELayer]:
        """Return the layers whose experts are trained."""
        all_layers = mixture_of(model).layers()
        if self.scope == "gates":
            return []
        numbers = layer_numbers(ALIGNED_LAYERS if self.layers is None else self.layers, len(all_layers))
        return [all_layers[number] for number in numbers]

    def _marked(self, task: DefenseTask) -> tuple[Split, MarkedLoss, Split | None]:
        """Return the marked images with their labels, the loss, and second answers to texts.

        See `preference_objective`.
        """
        if self.loss == "tuning":
            return task.marked, safe_answer_loss, None
        preferences, reference = safe_preferences(task, task.model)
        make = text_preference_loss if preferences.is_text else preference_objective
        split, loss = make(preferences, reference, self.beta)
        others = preferences.rejected if preferences.is_text else None
        return split, lambda found, _, labels: loss(found, labels), others
