"""Router-reset: draw the router's weights anew and re-train it, alone or with all else, on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.parts import check_tuning, router_of


class RouterReset(Defense):
    """Re-initialise the router, so that nothing of what the attacker taught it is left, and re-train on clean images.

    scope: "router" re-trains the router and nothing else; "all" the whole model. epochs: of tuning, from 1. lr:
    the run's own where None. clean_fraction: share of the training images the defender holds. Raises
    ConfigError for a model without a router.
    """

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
        """Reset, re-train."""
        router = router_of(task.model)
        with torch.no_grad():
            for own, drawn in zip(router, router_of(task.fresh()), strict=True):
                own.load_state_dict(drawn.state_dict())
        task.report("reset", task.model)
        modules = router if self.scope == "router" else None
        task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr, modules=modules)
        return DefenseResult("tuned", task.model)
