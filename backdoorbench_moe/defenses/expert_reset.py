"""Expert-reset: draw one expert's weights anew and re-train it alone on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.parts import accuracy_without, check_tuning, experts_of, least_missed
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.experts import copy_expert
from backdoorbench_moe.moe.norms import measure_statistics
from backdoorbench_moe.moe.structure import Expert


class ExpertReset(Defense):
    """Re-initialise one expert and re-train only its own rows on clean images; all else stays, bit for bit.

    expert: "least-missed", the one whose muting costs the least clean accuracy, as `expert-drop` would choose
    (it is the cheapest to learn again); or a name such as "moe/2"; or a number, its place among all experts from
    0 on. The router stays, so the expert gets the patches it got. epochs: of tuning, from 1. lr: the run's own
    where None. clean_fraction: share of the training images the defender holds.

    Its norms' statistics are measured on the clean images after the reset and after the tuning: a running mean
    of momentum 0.01 would not have come to them by then. Scores (of "least-missed"): clean accuracy, in
    percent, without each expert; verdict: the one reset. Raises ConfigError for a model that does not say where
    its experts lie, and for an expert it does not have.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        expert: str | int = "least-missed",
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        self.expert, self.epochs, self.lr = expert, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not say where its experts lie, or lacks the one named."""
        self._named(experts_of(model))

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Choose, reset, re-train."""
        experts = experts_of(task.model)
        chosen = self._named(experts)
        scores: dict[str, float] | None = None
        if chosen is None:
            scores = accuracy_without(task, experts)
            chosen = least_missed(experts, scores)
        copy_expert(task.fresh(), task.model, chosen)
        self._settle(task, chosen)
        task.report("reset", task.model)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, rows=chosen.own)
        self._settle(task, chosen)
        reason = (
            "clean accuracy in percent without the expert is the highest" if scores else "named by the option"
        )
        judged = Judgement("expert", reason, scores=scores, suspicious=[chosen.name])
        return DefenseResult("tuned", task.model, (judged,))

    def _named(self, experts: list[Expert]) -> Expert | None:
        """The expert that the option names; None where it is to be chosen."""
        if self.expert == "least-missed":
            return None
        if isinstance(self.expert, int):
            if not 0 <= self.expert < len(experts):
                raise ConfigError.expected("expert", f"0 to {len(experts) - 1}, or a name", self.expert)
            return experts[self.expert]
        for expert in experts:
            if expert.name == self.expert:
                return expert
        raise UnknownNameError("expert", self.expert, ["least-missed", *(e.name for e in experts)])

    def _settle(self, task: DefenseTask, expert: Expert) -> None:
        measure_statistics(task.model, expert.own, lambda: task.logits(task.model, task.clean.images))
