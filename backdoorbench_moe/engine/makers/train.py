"""Training a victim, or its clean twin, from data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.makers.base import Checkpoint, Maker
from backdoorbench_moe.engine.poison import poisoned
from backdoorbench_moe.engine.probe import Probe, check_probe
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.train import Trainer
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.models.base import StartsFromFile
from backdoorbench_moe.records import Record, RunFolder


class TrainMaker(Maker):
    """Trains a model on the (poisoned) training images, measures it and saves it."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        check_probe(spec, self.setup)

    def prepare(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights that training begins with, if the model names a file.

        Raises:
            ConfigError: The file is not there or does not fit.
        """
        if isinstance(self.setup.model, StartsFromFile):
            self.setup.model.load_start()

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train to the end of the spec, from the last checkpoint if there is one."""
        started = time.perf_counter()
        with self._training_split(folder, record) as split:
            probe = self._probe(folder)
            trainer = self._trainer(folder, split, probe)
            if checkpoint:
                trainer.restore(*checkpoint)
            if probe is not None:
                probe.begin(trainer.model, trainer.progress.epoch)
            # The same list, which grows with every epoch: so an interrupted run's record has it, too.
            record.history = trainer.progress.history
            progress = trainer.fit(folder.path.name)
        images = len(self.workplace.images.train)
        record.timing["train_seconds"] = progress.seconds
        record.timing["images_per_second"] = images * progress.epoch / progress.seconds
        evaluated = time.perf_counter()
        [record.metrics] = self.measure([trainer.model])
        record.timing["evaluate_seconds"] = time.perf_counter() - evaluated
        record.timing["total_seconds"] = time.perf_counter() - started
        folder.save_model(trainer.model.state_dict(), self.model_header())

    @contextmanager
    def _training_split(self, folder: RunFolder, record: Record) -> Iterator[Split]:
        """The training images as the victim sees them; they are poisoned for as long as the block lasts."""
        train, plan = self.workplace.images.train, self.setup.plan
        if plan is None:
            yield train
            return
        folder.save_poison({name: group.numpy() for name, group in plan.groups.items()})
        started = time.perf_counter()
        with poisoned(train, plan, self.setup.stamper) as split:
            record.timing["poison_seconds"] = time.perf_counter() - started
            yield split

    def _probe(self, folder: RunFolder) -> Probe | None:
        return Probe(self.setup, self.workplace.precision, folder) if self.spec.probe else None

    def _trainer(self, folder: RunFolder, split: Split, probe: Probe | None) -> Trainer:
        def keep(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
            # The probe first: a checkpoint that its probe file does not reach could not be continued.
            if probe is not None:
                probe.look(self.setup.model)
            folder.save_checkpoint(tensors, state)

        return Trainer(
            self.setup.model,
            split,
            self.spec.train,
            seed=self.spec.seed,
            device=self.workplace.device,
            precision=self.workplace.precision,
            on_checkpoint=keep,
            observer=self.workplace.observer,
        )
