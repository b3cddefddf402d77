"""Fine-tuning on clean images: which part of a model forgets the backdoor?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.parts import check_tuning, structure
from backdoorbench_moe.errors import ConfigError


class FineTuning(Defense):
    """Train the model, or one part of it, for some more epochs on clean images.

    scope: "all", or one of "experts", "router" and "head"; what is outside it keeps its weights and its norms'
    statistics. epochs: from 1. lr: the run's own where None, as all else of its recipe (optimizer, batch
    size, schedule) is. clean_fraction: share of the training images the defender holds. Raises ConfigError
    for a part the model does not have.
    """

    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        scope: Literal["all", "experts", "router", "head"] = "all",
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        self.scope, self.epochs, self.lr = scope, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no such part."""
        self._modules(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Tune what is in scope."""
        modules = self._modules(task.model)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, modules=modules)
        return DefenseResult("tuned", task.model)

    def _modules(self, model: nn.Module) -> Sequence[nn.Module] | None:
        if self.scope == "all":
            return None
        components = structure(model).components()
        if self.scope not in components:
            raise ConfigError.expected(
                "scope", f"one of {['all', *components]} for {type(model).__name__}", self.scope
            )
        return components[self.scope]
