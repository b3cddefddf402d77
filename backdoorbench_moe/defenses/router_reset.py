"""Router-reset: re-initialise the router and retrain it on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.requirements import check_tuning, router_of
from backdoorbench_moe.defenses.routers import reset_routers, router_lr


class RouterReset(Defense):
    """Re-initialise the router and retrain it on clean images.

    This removes everything that the router has learned from poisoned images. Experts that an earlier defense has masked
    stay masked.

    Args:
        scope: "router" trains the router only; "all" trains the full model.
        epochs: Epochs of training, from 1.
        lr: Peak learning rate, above 0. If None, that of the run's recipe; for a mixture, with the scope "router", that
            of the training of its gates.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the model has no router.

    Source:
        Ours.
    """

    takes_texts: ClassVar[bool] = True
    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"epochs": 1}

    def __init__(
        self,
        *,
        scope: Literal["router", "all"] = "router",
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_tuning(epochs, lr, at_least=1)
        self.scope, self.epochs, self.lr = scope, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no router."""
        router_of(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Reset the router, then train."""
        reset_routers(task)
        task.report("reset", task.model)
        if self.scope == "router":
            lr, modules = router_lr(task, self.lr), router_of(task.model)
        else:
            lr, modules = self.lr, None
        task.tune(task.model, task.clean, epochs=self.epochs, lr=lr, modules=modules)
        return DefenseResult("tuned", task.model)
