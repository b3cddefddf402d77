"""Training a victim, or its clean twin, or the base of a mixture, from data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint, Stopwatch, fit
from backdoorbench_moe.engine.poison import poisoned
from backdoorbench_moe.engine.probe import Probe, check_probe
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.models.base import StartsFromFile
from backdoorbench_moe.records import Record, RunFolder


class TrainMaker(Maker):
    """Trains a model on the (poisoned) training images, measures it and saves it."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        check_probe(spec, self.setup)

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights that training begins with, if the model names a file.

        Raises:
            ConfigError: The file is not there or does not fit.
        """
        if isinstance(self.setup.model, StartsFromFile):
            self.setup.model.load_start()

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train to the end of the spec, from the last checkpoint if there is one."""
        watch, model = Stopwatch(record), self.setup.model
        probe = Probe(self.setup, self.workplace.precision, folder) if self.spec.probe else None
        with self._training_split(folder, record) as split:
            fit(
                model,
                split,
                self.spec.train,
                seed=self.spec.seed,
                workplace=self.workplace,
                folder=folder,
                record=record,
                checkpoint=checkpoint,
                probe=probe,
            )
        watch.training_done()
        [record.metrics] = self.measure([model])
        watch.done()
        folder.save_model(model.state_dict(), self.model_header())

    @contextmanager
    def _training_split(self, folder: RunFolder, record: Record) -> Iterator[Split]:
        """The training images as the model sees them; they are changed for as long as the block lasts."""
        setup, train = self.setup, self.workplace.images.train
        plan = setup.plan
        if plan is None:
            yield setup.with_policy(train, self.spec.policy)
            return
        folder.save_poison({name: group.numpy() for name, group in plan.groups.items()})
        started = time.perf_counter()
        with poisoned(train, plan, setup.stamper) as split:
            record.timing["poison_seconds"] = time.perf_counter() - started
            yield split
