"""Fine-tuning of a model by an attack or a defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.config.train import NO_AUGMENTATION
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.train import Trainer
from backdoorbench_moe.ops.seeding import derive_seed
from backdoorbench_moe.ops.tuning import Objective


@dataclass
class Tuner:
    """The implementation of `backdoorbench_moe.ops.tuning.Tune`, which attacks and defenses call.

    Args:
        recipe: The training settings of the run. Calls may replace the number of epochs and the learning rate.
        seed: Seed of the attack or defense. Each call derives a different seed from it.
        device: The device.
        precision: "fp32" or "bf16".
        observer: Receives progress.
        name: Name of the training, for the observer.
        history: One row for each epoch of all calls.
        images: Number of images in all epochs of all calls.
    """

    recipe: TrainSpec
    seed: int
    device: torch.device
    precision: str
    observer: Observer
    name: str
    history: list[dict[str, float]] = field(default_factory=list)
    images: int = 0

    def __call__(
        self,
        model: nn.Module,
        split: Split,
        *,
        epochs: int,
        lr: float | None = None,
        modules: Sequence[nn.Module] | None = None,
        rows: Mapping[str, tuple[int, int]] | None = None,
        objective: Objective | None = None,
        augment: bool | None = None,
    ) -> None:
        """Train `model`, or some of its modules or rows, in place; it is left in evaluation mode."""
        if not epochs:
            return
        done = len(self.history)
        recipe = replace(self.recipe, epochs=epochs, lr=self.recipe.lr if lr is None else lr, freeze=())
        if not (objective is None if augment is None else augment):
            recipe = replace(recipe, augment=NO_AUGMENTATION)
        if rows is not None:
            modules = _owners(model, rows)
        with training_only(model, modules, rows):
            trainer = Trainer(
                model,
                split,
                recipe,
                seed=derive_seed(self.seed, "tune", done),
                device=self.device,
                precision=self.precision,
                on_checkpoint=lambda tensors, state: None,
                observer=self.observer,
                modules=modules,
                objective=objective,
            )
            if rows is not None:
                trainer.optimizer.register_step_post_hook(_put_back(model, modules or (), rows))
            history = trainer.fit(self.name).history
        model.eval()
        self.images += epochs * len(split)
        self.history += [{**row, "epoch": done + row["epoch"]} for row in history]


def _owners(model: nn.Module, rows: Mapping[str, tuple[int, int]]) -> list[nn.Module]:
    """Return the modules that own the parameters and buffers with these names.

    Raises:
        ValueError: A name is not in the model's state dict.
    """
    if unknown := sorted(rows.keys() - model.state_dict().keys()):
        raise ValueError(f"rows: expected names in the model's state dict, got {unknown}")
    return [model.get_submodule(name) for name in dict.fromkeys(key.rpartition(".")[0] for key in rows)]


def _put_back(
    model: nn.Module, modules: Sequence[nn.Module], rows: Mapping[str, tuple[int, int]]
) -> Callable[..., None]:
    """Return a hook, called after each step, that restores all values of the training modules except these rows.

    Gradients, weight decay and momentum then do not change the other values, and batches do not change the statistics
    of the other channels of a batch norm. The hook copies in place and on the device, as CUDA graphs require.
    """
    training = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    pairs = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in training:
            start, stop = rows.get(name, (0, 0))
            fixed = [tensor.detach()] if start == stop else [tensor.detach()[:start], tensor.detach()[stop:]]
            pairs += [(values, values.clone()) for values in fixed if values.numel()]

    @torch.no_grad()
    def put_back(*_: object) -> None:
        for values, kept in pairs:
            values.copy_(kept)

    return put_back


@contextmanager
def training_only(
    model: nn.Module,
    modules: Sequence[nn.Module] | None,
    rows: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[None]:
    """Inside the block, enable gradients only for the parameters of these modules, or only for those in `rows`."""
    if modules is None:
        yield
        return
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    before = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
    try:
        for name, parameter, required in before:
            wanted = id(parameter) in chosen and (rows is None or name in rows)
            parameter.requires_grad_(required and wanted)
        yield
    finally:
        for _, parameter, required in before:
            parameter.requires_grad_(required)
