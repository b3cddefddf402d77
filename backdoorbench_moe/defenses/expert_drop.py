"""Expert-drop: mute the experts on which clean accuracy depends least, since they may carry the backdoor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import accuracy_without, check_tuning, experts_of, least_missed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import active_experts, kept_muted, mute
from backdoorbench_moe.moe.structure import Expert
from backdoorbench_moe.ops.ranges import check_integer


class ExpertDrop(Defense):
    """Mute the experts on which clean accuracy depends least.

    Experts are muted one at a time, in each step the one without which clean accuracy is highest; in a tie, the first
    one. The idea is that of fine-pruning, with experts as the units. Experts that an earlier defense has muted or
    masked are not chosen. The judgement's scores are the clean accuracies, in percent, without each single expert; its
    details contain the accuracy after each step.

    Args:
        count: Number of experts to mute, from 1. Every routed layer keeps at least one expert that is neither muted nor
            masked.
        epochs: Epochs of tuning on clean images afterwards, from 0; muted experts stay muted.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the model does not implement the protocol `WithExperts`, or it has too few
            experts.

    Source:
        Ours; the idea is that of "Fine-Pruning" (Liu et al., RAID 2018).
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self, *, count: int = 1, epochs: int = 0, lr: float | None = None, clean_fraction: float = 0.05
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_integer("count", count, 1)
        check_tuning(epochs, lr, at_least=0)
        # `count` is a method of the interface.
        self.drop, self.epochs, self.lr = count, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not name its experts, or has too few."""
        self._active(model)

    def _active(self, model: nn.Module) -> list[Expert]:
        experts = active_experts(model, experts_of(model))
        most = len(experts) - len({expert.layer for expert in experts})
        if not most:
            raise ConfigError(
                f"model: expected a layer of at least 2 experts, {type(model).__name__} has only one in each"
            )
        if self.drop > most:
            raise ConfigError.expected(
                "count", f"1 to {most} of the {len(experts)} experts of {type(model).__name__}", self.drop
            )
        return experts

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Measure the accuracy without each remaining expert, once for every expert to mute, then tune."""
        experts = len(experts_of(model))
        tried = sum(experts - dropped for dropped in range(self.drop))
        return Cost(trained=self.epochs * held, predicted=tried * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Mute the experts one by one, then tune."""
        experts = self._active(task.model)
        scores = found = accuracy_without(task, experts_of(task.model))
        dropped: list[Expert] = []
        after: list[float] = []
        while len(dropped) < self.drop:
            left = _droppable(experts, dropped)
            if dropped:
                found = accuracy_without(task, left, dropped)
            dropped.append(least_missed(left, found))
            after.append(found[dropped[-1].name])
        mute(task.model, dropped)
        if self.epochs:
            task.report("dropped", task.model)
            with kept_muted(task.model, dropped):
                task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr)
        return DefenseResult(
            "tuned" if self.epochs else "dropped",
            task.model,
            (
                Judgement(
                    "expert",
                    "clean accuracy in percent without the expert is the highest of those left",
                    scores=scores,
                    suspicious=[expert.name for expert in dropped],
                    details={"accuracy": after},
                ),
            ),
        )


def _droppable(experts: list[Expert], dropped: list[Expert]) -> list[Expert]:
    """Return the experts that are neither dropped nor the only ones left in their layer."""
    names = {expert.name for expert in dropped}
    left = [expert for expert in experts if expert.name not in names]
    active = Counter(expert.layer for expert in left)
    return [expert for expert in left if active[expert.layer] > 1]
