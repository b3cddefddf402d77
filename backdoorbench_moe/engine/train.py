"""Training to the end of the spec, from the last checkpoint if there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.observer import Observer
from backdoorbench_moe.engine.step import TrainStep, make_optimizer
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.ops.seeding import generator, seeded

SECONDS_BETWEEN_LOSSES = 1.0


@dataclass
class Progress:
    """What a checkpoint holds beside tensors: finished epochs, their history, time spent on them."""

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def learning_rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Learning rate of step `step` of `steps` (from 0)."""
    if spec.schedule == "constant":
        return spec.lr
    peak = spec.warmup * steps
    position = step + 0.5
    return spec.lr * (position / peak if position < peak else (steps - position) / (steps - peak))


class Trainer:
    """Trains a model on a split; `on_checkpoint(tensors, state)` is called after every epoch.

    modules: those in training mode while it trains, the others are in evaluation mode; all where None.
    compile: see `TrainStep`; off, as it gained nothing on a CPU (1.01x) and was not measured on a GPU.
    The order of images and any noise a model draws come from the seed and the epoch alone, so a run that
    goes on from a checkpoint sees the same as one that was never stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        spec: TrainSpec,
        *,
        seed: int,
        device: torch.device,
        precision: str,
        on_checkpoint: Callable[[dict[str, Tensor], dict[str, Any]], None],
        observer: Observer | None = None,
        modules: Sequence[nn.Module] | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.split, self.spec, self.seed, self.device = split, spec, seed, device
        self.optimizer = make_optimizer(model, spec, device)
        self.step = TrainStep(model, self.optimizer, split, device, precision, compile=compile)
        self.progress = Progress()
        self.on_checkpoint, self.observer = on_checkpoint, observer or Observer()
        self.modules = modules

    def fit(self, name: str) -> Progress:
        """Train the epochs that are left. Raises RecordError if the loss is no longer finite."""
        done = self.progress.epoch
        self.observer.on_train_start(name, epochs=self.spec.epochs, done=done, images=len(self.split))
        try:
            with reproducible(self.device):
                for epoch in range(done, self.spec.epochs):
                    row = self._epoch(epoch)
                    self.progress.history.append(row)
                    self.progress.epoch, self.progress.seconds = (
                        epoch + 1,
                        self.progress.seconds + row["seconds"],
                    )
                    self.on_checkpoint(self.tensors(), vars(self.progress).copy())
                    self.observer.on_epoch(epoch + 1, row)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"train.batch_size: {self.spec.batch_size} leaves a last batch of one image, "
                "which this model's batch norm cannot take; choose another"
            ) from error
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"train.batch_size: {self.spec.batch_size} images and this model do not fit {self.device}"
            ) from error
        finally:
            self.observer.on_train_end()
        return self.progress

    def _epoch(self, epoch: int) -> dict[str, float]:
        """One pass over all images, the last smaller batch included."""
        self.model.train(self.modules is None)
        for module in self.modules or ():
            module.train()
        self.step.reset()
        order = torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch)).to(
            self.device
        )
        batches = order.split(min(self.spec.batch_size, len(order)))
        steps, start, told, seen = (
            self.spec.epochs * len(batches),
            time.perf_counter(),
            time.perf_counter(),
            0,
        )
        with seeded(self.seed, "noise", epoch):
            for number, indices in enumerate(batches):
                lr = learning_rate(self.spec, epoch * len(batches) + number, steps)
                self.step.set_lr(lr)
                self.step(indices)
                seen, loss, now = seen + len(indices), None, time.perf_counter()
                # On a GPU, reading the loss would make the host wait for the device.
                if self.device.type == "cpu" and now - told > SECONDS_BETWEEN_LOSSES:
                    loss, told = self.step.loss_sum.item() / seen, now
                self.observer.on_step(len(indices), loss)
        loss = self.step.loss_sum.item() / seen
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise RecordError(f"training diverged in epoch {epoch + 1}: the loss is {loss}; lower train.lr?")
        accuracy = 100 * self.step.hits.item() / seen
        return {"epoch": epoch + 1, "loss": loss, "train_accuracy": accuracy, "lr": lr, "seconds": seconds}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state, flat, for a checkpoint."""
        flat = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        return flat

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a checkpoint. Raises RecordError if it does not fit the model."""
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        load_weights(self.model, weights, "checkpoint")
        try:
            self._restore_optimizer(tensors)
            self.progress = Progress(**state)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RecordError(f"checkpoint: damaged ({error}); delete it to train from the start") from error

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        optimizer = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # The fused optimizers walk memory, so a buffer must lie in memory as its weight does.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights whose names and shapes must all fit. Raises RecordError naming the first that does not."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise RecordError(
            f"{source}: weight {name!r} is {'missing' if name in own else 'unknown to the model'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise RecordError(
                f"{source}: weight {name!r}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
    model.load_state_dict(tensors)
