"""Training a model further, for a defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        rows: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Train `model`, or only some of its modules or rows, in place; it is left in evaluation mode."""
        if not epochs:
            return
        done = len(self.history)
        if rows is not None:
            modules = _owners(model, rows)
        with _only(model, modules, rows):
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
            if rows is not None:
                trainer.optimizer.register_step_post_hook(_put_back(model, modules or (), rows))
            history = trainer.fit(self.name).history
        model.eval()
        self.history += [{**row, "epoch": done + row["epoch"]} for row in history]


def _owners(model: nn.Module, rows: Mapping[str, tuple[int, int]]) -> list[nn.Module]:
    """The modules whose own parameters or buffers these are. Raises ValueError for a name that is none."""
    if unknown := sorted(rows.keys() - model.state_dict().keys()):
        raise ValueError(f"rows: expected names in the model's state dict, got {unknown}")
    return [model.get_submodule(name) for name in dict.fromkeys(key.rpartition(".")[0] for key in rows)]


def _put_back(
    model: nn.Module, modules: Sequence[nn.Module], rows: Mapping[str, tuple[int, int]]
) -> Callable[..., None]:
    """A hook behind a step that puts everything but these rows of the training modules back where it was.

    Neither gradients, weight decay nor momentum then move the rest, and a norm's statistics of other
    channels rest too. Only copies on the device, in place, as a CUDA graph needs them.
    """
    training = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    pairs = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in training:
            start, stop = rows.get(name, (0, 0))
            parts = [tensor.detach()] if start == stop else [tensor.detach()[:start], tensor.detach()[stop:]]
            pairs += [(part, part.clone()) for part in parts if part.numel()]

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for part, kept in pairs:
            part.copy_(kept)

    return put_back


@contextmanager
def _only(
    model: nn.Module,
    modules: Sequence[nn.Module] | None,
    rows: Mapping[str, tuple[int, int]] | None,
) -> Iterator[None]:
    """Let only the parameters of these modules, or those with some of the rows, take gradients inside the block."""
    if modules is None:
        yield
        return
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    before = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
    try:
        for name, parameter, asked in before:
            wanted = id(parameter) in chosen and (rows is None or name in rows)
            parameter.requires_grad_(asked and wanted)
        yield
    finally:
        for _, parameter, asked in before:
            parameter.requires_grad_(asked)
