"""Train a run's model with checkpoints, and record the timing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.makers.probe import Probe
from backdoorbench_moe.engine.training.checkpoint import Companion
from backdoorbench_moe.engine.training.freezing import freezing
from backdoorbench_moe.engine.training.train import Trainer
from backdoorbench_moe.engine.training.tune import training_only
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.ops.tuning import Objective
from backdoorbench_moe.records import Record, RunFolder

# Tensors and JSON values of `RunFolder.load_checkpoint`.
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]


def fit(
    model: nn.Module,
    split: Split,
    train: TrainSpec,
    *,
    seed: int,
    workplace: Workplace,
    folder: RunFolder,
    record: Record,
    checkpoint: Checkpoint | None,
    modules: Sequence[nn.Module] | None = None,
    probe: Probe | None = None,
    objective: Objective | None = None,
    companion: Companion | None = None,
    cuda_graphs: bool = True,
) -> None:
    """Train a model in place, and fill in the record's history and timing.

    Args:
        model: The model.
        split: The training images.
        train: The training settings. With 0 epochs, the model is only moved to the device.
        seed: Seed of the training.
        workplace: The device, the precision and the observer.
        folder: The run folder, to which a checkpoint is written after every epoch.
        record: The record of the run. If training is interrupted, it contains the history of the finished epochs.
        checkpoint: The checkpoint to continue from; None for a new run.
        modules: The modules to train; all if None. See `Trainer`.
        probe: Records the routing before training and after every epoch; None to record nothing.
        objective: The loss; see `Trainer`.
        companion: Networks that are trained together with the model; see `Trainer`.
        cuda_graphs: Whether the objective may be captured in a CUDA graph; see `TrainStep`.
    """
    if not train.epochs:
        model.to(workplace.device)
        return
    with training_only(model, modules), freezing(model, train.freeze) as resting:
        trainer = Trainer(
            model,
            split,
            train,
            seed=seed,
            device=workplace.device,
            precision=workplace.precision,
            on_checkpoint=partial(_keep, folder, model, probe),
            observer=workplace.observer,
            modules=modules,
            resting=resting,
            objective=objective,
            companion=companion,
            cuda_graphs=cuda_graphs,
        )
        if checkpoint:
            trainer.restore(*checkpoint)
        if probe is not None:
            probe.begin(trainer.model, trainer.progress.epoch)
        # The same list object, to which every epoch is appended.
        record.history = trainer.progress.history
        progress = trainer.fit(folder.path.name)
    record.timing["train_seconds"] = progress.seconds
    record.timing["images_per_second"] = len(split) * progress.epoch / progress.seconds


def _keep(
    folder: RunFolder,
    model: nn.Module,
    probe: Probe | None,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Save a checkpoint."""
    # Write the probe file first: a checkpoint cannot be continued if the probe file is behind it.
    if probe is not None:
        probe.look(model)
    folder.save_checkpoint(tensors, state)


class Stopwatch:
    """Writes the duration of the evaluation and the total duration to a record's timing."""

    def __init__(self, record: Record) -> None:
        self.record, self.started = record, time.perf_counter()
        self.trained = self.started

    def training_done(self) -> None:
        """Mark the end of the training and the start of the evaluation."""
        self.trained = time.perf_counter()

    def done(self) -> None:
        """Write the durations."""
        now = time.perf_counter()
        self.record.timing |= {"evaluate_seconds": now - self.trained, "total_seconds": now - self.started}
