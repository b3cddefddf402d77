"""Training a model further, for a defense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.train import Trainer
from backdoorbench_moe.ops.seeding import derive_seed


@dataclass
class Tuner:
    """What a defense calls to train a model further; see `backdoorbench_moe.defenses.base.Tune`.

    name: what the observer is told is trained. history: a row an epoch, over all calls.
    """

    recipe: TrainSpec
    seed: int
    device: torch.device
    precision: str
    observer: Observer
    name: str
    history: list[dict[str, float]] = field(default_factory=list)

    def __call__(
        self,
        model: nn.Module,
        split: Split,
        *,
        epochs: int,
        lr: float | None = None,
        modules: Sequence[nn.Module] | None = None,
    ) -> None:
        """Train `model`, or only some of its modules, in place; it is left in evaluation mode."""
        if not epochs:
            return
        done = len(self.history)
        with _only(model, modules):
            trainer = Trainer(
                model,
                split,
                replace(self.recipe, epochs=epochs, lr=self.recipe.lr if lr is None else lr),
                seed=derive_seed(self.seed, "tune", done),
                device=self.device,
                precision=self.precision,
                on_checkpoint=lambda tensors, state: None,
                observer=self.observer,
                modules=modules,
            )
            rows = trainer.fit(self.name).history
        model.eval()
        self.history += [{**row, "epoch": done + row["epoch"]} for row in rows]


@contextmanager
def _only(model: nn.Module, modules: Sequence[nn.Module] | None) -> Iterator[None]:
    """Let only the parameters of these modules take gradients inside the block."""
    if modules is None:
        yield
        return
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, asked in before:
            parameter.requires_grad_(asked and id(parameter) in chosen)
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
