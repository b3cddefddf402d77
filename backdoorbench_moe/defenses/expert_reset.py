"""Expert-reset: re-initialise one expert and retrain only this expert on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import accuracy_without, check_tuning, experts_of, least_missed
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.experts import active_experts, copy_expert
from backdoorbench_moe.moe.norms import measure_statistics
from backdoorbench_moe.moe.structure import Expert


class ExpertReset(Defense):
    """Re-initialise one expert and retrain only this expert on clean images.

    Only the rows of weights that belong to the expert change; all other values stay exactly the same.

    The router is not changed, so the expert still processes the same patches. The running statistics of the expert's
    norms are measured on the clean images after the reset and again after the training, because a running mean with a
    momentum of 0.01 would not converge in so few steps. With `expert="least-missed"`, the judgement's scores are the
    clean accuracies, in percent, without each expert.

    Args:
        expert: The expert: its name, such as "moe/2"; its number among all experts, from 0; or "least-missed", the one
            without which clean accuracy is highest, as in `expert-drop`. That one is the easiest to relearn. Experts
            that an earlier defense has muted or masked are not chosen.
        epochs: Epochs of training, from 1.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the model does not implement the protocol `WithExperts`, or the expert
            does not exist; or, for "least-missed", all experts are muted or masked.

    Source:
        Ours.
    """

    tuning_length: ClassVar[str | None] = "epochs"
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
        """Raise ConfigError if the model does not name its experts, or does not have the chosen one."""
        self._named(experts_of(model))

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Measure the accuracy without each expert, tune, and measure the statistics of the norms twice."""
        experts = experts_of(model)
        tried = len(experts) if self.expert == "least-missed" else 0
        norms = sum(key.endswith("running_mean") for key in experts[0].own)
        return Cost(trained=self.epochs * held, predicted=(tried + 2 * norms) * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Choose the expert, reset it, and train it."""
        experts = experts_of(task.model)
        chosen = self._named(experts)
        scores: dict[str, float] | None = None
        if chosen is None:
            if not (active := active_experts(task.model, experts)):
                raise ConfigError("expert: all experts are muted or masked; expected the name of one")
            scores = accuracy_without(task, experts)
            chosen = least_missed(active, scores)
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
        """Return the expert that the option names; None for "least-missed"."""
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
