"""Train a victim, a clean twin or the base of a mixture on data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.control import ControlledTraining
from backdoorbench_moe.engine.makers.fitting import Checkpoint, Stopwatch, fit
from backdoorbench_moe.engine.makers.probe import Probe, check_probe
from backdoorbench_moe.engine.makers.surrogate import TriggerOptimisation
from backdoorbench_moe.engine.poisoning.learned import keep_trigger, restore_trigger
from backdoorbench_moe.engine.poisoning.poison import poisoned
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.training.freezing import frozen_names
from backdoorbench_moe.engine.weights.start import Start, load_start
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.models.base import StartsFromFile
from backdoorbench_moe.records import Record, RunFolder
from backdoorbench_moe.triggers.optimised import OptimisedTrigger


class TrainMaker(Maker):
    """Trains a model on the (poisoned) training images, measures it and saves it."""

    starts_from_file = True

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        check_probe(spec, self.setup)
        frozen_names(self.setup.model, spec.train.freeze)
        self.optimisation: TriggerOptimisation | None = None
        if self.setup.stamper is not None and isinstance(self.setup.stamper.trigger, OptimisedTrigger):
            self.optimisation = TriggerOptimisation(spec, self.setup, workplace)
        self.control: ControlledTraining | None = None
        if isinstance(self.setup.attack, TrainingControl):
            self.control = ControlledTraining(spec, self.setup, workplace)

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the surrogate of the trigger and the file of initial weights, if there are any.

        Raises:
            ConfigError: The file is missing or does not match the model.
            RecordError: The file in the model's option `weights` is missing or does not match the model; or the
                surrogate is not the run that the spec needs or does not match its model.
        """
        if self.optimisation is not None:
            self.optimisation.load(inputs)
        model = self.setup.model
        origin = model.load_start() if isinstance(model, StartsFromFile) else None
        self.start = load_start(self.spec, model, self.workplace.observer)
        if origin is not None:
            self.start = Start(origin.sha256, origin.backdoored, notes=())

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train and measure the model, from the last checkpoint if there is one, and save it."""
        watch, model = Stopwatch(record), self.setup.model
        self._learn_trigger(folder, record, checkpoint)
        control = self.control
        companion = None if control is None else control.companion()
        if control is not None and checkpoint is None:
            started = time.perf_counter()
            control.pretrain()
            record.timing["trigger_seconds"] = time.perf_counter() - started
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
                objective=None if control is None else control.objective,
                companion=companion,
                cuda_graphs=control is None or control.capturable,
            )
        if control is not None:
            control.finish()
            keep_trigger(self.setup.stamper, folder, record)
        watch.training_done()
        [record.metrics] = self.measure([model])
        watch.done()
        folder.save_model(model.state_dict(), self.model_header(record))

    def _learn_trigger(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Optimise the trigger if it is an `OptimisedTrigger`. A continued run loads the trigger of its first part."""
        if self.optimisation is None:
            return
        if checkpoint is not None:
            restore_trigger(self.setup.stamper, folder, record)
            return
        started = time.perf_counter()
        record.parts["trigger"] |= self.optimisation.run()
        record.timing["trigger_seconds"] = time.perf_counter() - started
        keep_trigger(self.setup.stamper, folder, record)
        self.optimisation = None  # Free the memory of the surrogate.

    @contextmanager
    def _training_split(self, folder: RunFolder, record: Record) -> Iterator[Split]:
        """The training images, including poisoned ones. The data are changed in place inside the block."""
        setup, train = self.setup, self.setup.data.train
        plan = setup.plan
        if plan is None:
            yield setup.with_policy(train, self.spec.policy)
            return
        folder.save_poison({name: group.numpy() for name, group in plan.groups.items()})
        started = time.perf_counter()
        with poisoned(train, plan, setup.stamper) as split:
            record.timing["poison_seconds"] = time.perf_counter() - started
            yield split
