"""Expert-drop: mute the experts that clean images miss least; a backdoor may live in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.parts import accuracy_without, check_tuning, experts_of, least_missed
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import kept_muted, mute
from backdoorbench_moe.moe.structure import Expert


class ExpertDrop(Defense):
    """Mute `count` experts, one after the other, each time the one without which clean accuracy is highest.

    count: from 1; every routed layer keeps one expert at least. epochs: of tuning on clean images afterwards,
    in which the muted ones stay so; 0 only mutes. lr: the run's own where None. clean_fraction: share of the
    training images the defender holds. Of equals, the first expert goes. Scores: clean accuracy, in percent,
    without each expert alone; verdict: those dropped, in order, and the accuracy after each. Raises ConfigError
    for a model that does not say where its experts lie, and for more experts than there are to drop.

    The idea of pruning what clean images do not need (Liu et al., RAID 2018), with an expert as the unit.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self, *, count: int = 1, epochs: int = 0, lr: float | None = None, clean_fraction: float = 0.05
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if count < 1:
            raise ConfigError.expected("count", "a whole number from 1", count)
        check_tuning(epochs, lr, at_least=0)
        # Not `count`: that is the interface's name for the number of images.
        self.drop, self.epochs, self.lr = count, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not say where its experts lie, or has too few."""
        experts = experts_of(model)
        most = len(experts) - len({expert.layer for expert in experts})
        if self.drop > most:
            raise ConfigError.expected(
                "count", f"1 to {most} of the {len(experts)} experts of {type(model).__name__}", self.drop
            )

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Rank, mute, tune."""
        experts = experts_of(task.model)
        scores = found = accuracy_without(task, experts)
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
    """Experts still heard that are not the last of their layer."""
    gone = {expert.name for expert in dropped}
    left = [expert for expert in experts if expert.name not in gone]
    heard = Counter(expert.layer for expert in left)
    return [expert for expert in left if heard[expert.layer] > 1]
