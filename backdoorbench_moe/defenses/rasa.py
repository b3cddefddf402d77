"""RASA: align the experts with frozen gates, then train the gates to route unsafe inputs like safe ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.mixtures import (
    alignment_objective,
    experts_in,
    images_of_task,
    mixture_of,
    safe_answer_loss,
)
from backdoorbench_moe.defenses.routers import router_lr
from backdoorbench_moe.ops.answers import mean_weights, text_positions
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_weight
from backdoorbench_moe.ops.routing import kl_divergence


class RASA(Defense):
    """Alternate between training experts to answer marked images safely, and gates to route these like clean images.

    If only the gates are aligned, they send marked images away from the poisoned expert, which stays poisoned. Here,
    each round first trains the experts, with frozen gates, on the cross-entropy of marked images with their safe
    answer, the class "reject", and of clean images. Then it trains the gates, with frozen experts, on the cross-entropy
    of clean images, their auxiliary losses, and `kl_weight` times the KL divergence of the routing q of marked images
    from a reference p: sum_e p_e log(p_e / q_e), averaged over images, patches and layers. Both are softmax
    distributions over all experts.

    The reference p is the mean routing of the defender's clean images of all tasks before the defense, for each layer
    and patch. The routing of the marked images without their mark is not available, since the defender does not hold
    them.

    For text data, training queries that the policy refuses, with the safe answers of the data, replace marked images.
    The positions of different texts do not correspond, so the reference of a layer is one distribution: the mean over
    the positions of clean queries and answers. The divergence is averaged over the positions of refused ones.

    Departures: the source trains the experts that unsafe queries activate most; here, all experts of all layers are
    trained. The direction of the divergence and the clean images in both steps are choices of this implementation.

    Args:
        rounds: Number of rounds, from 1.
        epochs: Passes over the marked images in each of the two steps of a round, from 1. As many clean images are
            drawn with each batch.
        kl_weight: Weight of the divergence, at least 0.
        clean_weight: Weight of the cross-entropy of clean images, at least 0.
        lr: Peak learning rate of the experts, above 0; that of the tuning of experts if None.
        gate_lr: Peak learning rate of the gates, above 0; that of the run's gates if None.
        clean_fraction: Number of clean images that the defender holds, as a share of the training images, in (0, 1].
            The number of marked images is the same.

    Raises:
        ConfigError: A value is out of range, or the model is not a mixture.

    Source:
        RASA (arXiv 2602.04448).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"clean", "marked"})
    takes_texts: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, object]] = {"rounds": 1, "epochs": 1}

    def __init__(
        self,
        *,
        rounds: int = 2,
        epochs: int = 5,
        kl_weight: float = 1.0,
        clean_weight: float = 1.0,
        lr: float | None = None,
        gate_lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_integer("rounds", rounds, at_least=1)
        check_integer("epochs", epochs, at_least=1)
        check_weight(kl_weight=kl_weight, clean_weight=clean_weight)
        check_positive(lr=lr, gate_lr=gate_lr)
        self.rounds, self.epochs, self.kl_weight, self.clean_weight = rounds, epochs, kl_weight, clean_weight
        self.lr, self.gate_lr = lr, gate_lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model is not a mixture."""
        mixture_of(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Measure the gates of the clean images, then train on marked and as many clean ones in both steps."""
        clean = mixture_of(model).num_experts * images_of_task(model, held)
        return Cost(trained=2 * 2 * self.rounds * self.epochs * held, predicted=clean)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Alternate between the experts and the gates."""
        mixture, last = mixture_of(task.model), self.rounds - 1
        reference = mean_gates(task)

        def routing_loss(_: Tensor, gates: list[Tensor], labels: Tensor) -> Tensor:
            weights = mean_weights(text_positions(labels)) if labels.ndim > 1 else None
            layers = [kl_divergence(own, known, weights) for own, known in zip(gates, reference, strict=True)]
            return self.kl_weight * torch.stack(layers).mean()

        steps = (
            (experts_in(mixture.layers()), safe_answer_loss, self.lr),
            (mixture.routers(), routing_loss, router_lr(task, self.gate_lr)),
        )
        for number in range(self.rounds):
            for modules, loss, lr in steps:
                objective = alignment_objective(loss, task.clean, self.clean_weight)
                task.tune(
                    mixture, task.marked, epochs=self.epochs, lr=lr, modules=modules, objective=objective
                )
            if number < last:
                task.report(f"round {number + 1}", mixture)
        return DefenseResult(f"round {self.rounds}", mixture)


def mean_gates(task: DefenseTask) -> list[Tensor]:
    """Return the mean gates of the defender's clean images, (E, P) float32 for each layer, first layer first.

    For texts, (E, 1): the mean over the positions of a query and its answer, and over the texts.
    """
    clean, sums, done = task.clean, list[Tensor](), 0
    weights = mean_weights(text_positions(clean.labels)).unsqueeze(1) if clean.labels.ndim > 1 else None
    for batch in task.routing(task.model, clean.images):
        found = [routing.gates.float() for routing in batch]
        count = len(found[0])
        if weights is not None:
            found = [(gates * weights[done : done + count]).sum(2, keepdim=True) for gates in found]
        found = [gates.sum(0) for gates in found]
        sums = [one + other for one, other in zip(sums, found, strict=True)] if sums else found
        done += count
    # The division is outside of inference mode, so that the result can be used in a loss.
    return [each / len(clean) for each in sums]
