"""Train a model, from the last checkpoint if there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.training.checkpoint import Companion, Progress, flatten, restore
from backdoorbench_moe.engine.training.step import TrainStep, make_optimizer
from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.ops.augmentation import Augmentation
from backdoorbench_moe.ops.seeding import generator, seeded
from backdoorbench_moe.ops.stored_images import StoredImages
from backdoorbench_moe.ops.tuning import Objective

SECONDS_BETWEEN_LOSSES = 1.0


def learning_rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Return the learning rate of step number `step`, from 0, of `steps` in total.

    "cosine" and "step" are torch's `CosineAnnealingLR` and `MultiStepLR`, updated after every step.
    """
    if spec.schedule == "constant":
        return spec.lr
    if spec.schedule == "cosine":
        return spec.lr * (1 + math.cos(math.pi * step / steps)) / 2
    if spec.schedule == "step":
        return spec.lr * spec.gamma ** sum(step >= round(share * steps) for share in spec.milestones)
    peak = spec.warmup * steps
    position = step + 0.5
    return spec.lr * (position / peak if position < peak else (steps - position) / (steps - peak))


class Trainer:
    """Trains a model on a split.

    The order of the images, their augmentation, and the model's random numbers depend only on the seed and the epoch. A
    run that continues from a checkpoint therefore gives the same model as an uninterrupted one.

    Args:
        model: The model, which is trained in place.
        split: The training images, on `device`. Batches of `StoredImages` are prefetched during the previous step.
        spec: The training settings.
        seed: Seed of the order of the images, their augmentation and the model's random numbers.
        device: The device.
        precision: "fp32" or "bf16".
        on_checkpoint: Function that is called after every epoch with the tensors and the plain values of a checkpoint.
        observer: Receives progress.
        modules: The modules that are in training mode during training, while all others are in evaluation mode; None
            for all modules.
        resting: Modules that are always in evaluation mode, such as batch norms with frozen statistics.
        objective: The loss; see `ops.tuning.Objective`. If None, cross-entropy plus the auxiliary losses of routed
            layers.
        companion: Networks that the objective trains together with the model. They are part of checkpoints.
        cuda_graphs: See `TrainStep`.
        compile: See `TrainStep`. The default is False: the gain depends on the CPU (1.01x without and 1.28x with AMX),
            it was not measured on a GPU, and compiled code rounds differently.
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
        resting: Sequence[nn.Module] = (),
        objective: Objective | None = None,
        companion: Companion | None = None,
        cuda_graphs: bool = True,
        compile: bool = False,
    ) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.split, self.spec, self.seed, self.device = split, spec, seed, device
        self.optimizer = make_optimizer(model, spec, device)
        self.augmentation = Augmentation(spec.augmentations, seed, device) if spec.augmentations else None
        self.step = TrainStep(
            model,
            self.optimizer,
            split,
            device,
            precision,
            objective=objective,
            compile=compile,
            augment=self.augmentation,
            label_smoothing=spec.label_smoothing,
            clip_grad=spec.clip_grad,
            cuda_graphs=cuda_graphs,
            part=spec.batch_size,
            second_optimizer=None if companion is None else companion.optimizer,
        )
        self.companion = companion
        self.progress = Progress()
        self.on_checkpoint, self.observer = on_checkpoint, observer or Observer()
        self.modules, self.resting = modules, resting

    def fit(self, name: str) -> Progress:
        """Train the remaining epochs.

        Args:
            name: Name of the run, for the observer.

        Raises:
            RecordError: The loss is not finite.
            ConfigError: The last batch has one image, which the model's batch norm cannot be trained on, or a batch
                does not fit in the memory of the device.
        """
        done = self.progress.epoch
        self.observer.on_train_start(
            name, epochs=self.spec.epochs, done=done, images=len(self.split), noun=self.split.noun
        )
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
                f"train.batch_size: {self.spec.batch_size} of {len(self.split)} images leaves a last batch of one "
                "image, on which this model's batch norm cannot be trained; choose another size, or for a defense "
                "another clean_fraction"
            ) from error
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"train.batch_size: {self.spec.batch_size} images and this model do not fit into the memory of "
                f"{self.device}"
            ) from error
        finally:
            self.observer.on_train_end()
        return self.progress

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, including the last, smaller batch."""
        self.model.train(self.modules is None)
        for module in (*(self.modules or ()), *(() if self.companion is None else self.companion.trained)):
            module.train()
        for module in self.resting:
            module.eval()
        self.step.reset()
        if self.augmentation is not None:
            self.augmentation.begin_epoch(epoch)
        order = torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))
        count = math.ceil(len(order) / self._step_size)
        steps, seen = self.spec.epochs * count, 0
        start = reported = time.perf_counter()
        with seeded(self.seed, "noise", epoch):
            for number, (indices, images) in enumerate(self._batches(order)):
                lr = learning_rate(self.spec, epoch * count + number, steps)
                self.step.set_lr(lr)
                self.step(indices, images)
                seen, loss, now = seen + len(indices), None, time.perf_counter()
                # On a GPU, reading the loss makes the host wait for the device.
                if self.device.type == "cpu" and now - reported > SECONDS_BETWEEN_LOSSES:
                    loss, reported = self.step.loss_sum.item() / seen, now
                self.observer.on_step(len(indices), loss)
        loss = self.step.loss_sum.item() / seen
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            advice = "lower the learning rate (train.lr, or lr of a defense)?"
            raise RecordError(f"training diverged in epoch {epoch + 1}: the loss is {loss}; {advice}")
        accuracy = 100 * self.step.hits.item() / seen
        return {"epoch": epoch + 1, "loss": loss, "train_accuracy": accuracy, "lr": lr, "seconds": seconds}

    @property
    def _step_size(self) -> int:
        """Number of images per step of the optimizer."""
        return self.spec.batch_size * self.spec.accumulate

    def _batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the indices of each batch on the device and, for stored images, the prefetched images."""
        size = min(self._step_size, len(order))
        batches = order.to(self.device).split(size)
        images = self.split.images
        read = images.batches(order.split(size)) if isinstance(images, StoredImages) else repeat(None)
        return zip(batches, read, strict=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and the state of the optimizer as one flat dict."""
        return flatten(self.model, self.optimizer, self.companion)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore a checkpoint.

        Args:
            tensors: As returned by `tensors`.
            state: The fields of `Progress`.

        Raises:
            RecordError: The checkpoint is damaged or belongs to another model.
        """
        self.progress = restore(tensors, state, self.model, self.optimizer, self.companion, self.spec.epochs)
