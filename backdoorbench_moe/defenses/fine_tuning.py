"""Fine-tuning of a model, or of one of its components, on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.requirements import Scope, check_tuning, modules_in


class FineTuning(Defense):
    """Train the model, or one of its components, further on clean images.

    Optimizer, batch size and schedule are those of the run's recipe. Defenses that tune are compared with it.

    Args:
        scope: What is trained: "all", or the component "experts", "router" or "head". The rest of the model keeps its
            weights and the running statistics of its norms.
        epochs: Epochs of training, from 1.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the model does not have the component.
    """

    takes_texts: ClassVar[bool] = True
    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        scope: Scope = "all",
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        self.scope, self.epochs, self.lr = scope, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not have the component."""
        modules_in(model, self.scope)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Train what is in scope."""
        modules = modules_in(task.model, self.scope)
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, modules=modules)
        return DefenseResult("tuned", task.model)
