"""Fine-tune one expert of a mixture: on its task from the base, or by an attacker from the benign expert."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.build import naming_attack
from backdoorbench_moe.engine.graph import BASE, BENIGN
from backdoorbench_moe.engine.inference import logits
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint, Stopwatch, fit
from backdoorbench_moe.engine.makers.given import GivenExpert
from backdoorbench_moe.engine.makers.inputs import load_input
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.merging import check_mergeable
from backdoorbench_moe.ops.seeding import derive_seed, generator
from backdoorbench_moe.records import Record, RunFolder

# Share of a task's training images that an attacker holds out for choosing hyperparameters.
HELD_OUT = 0.1


class ExpertMaker(Maker):
    """Fine-tunes the MLPs of the base on one task (and marked images, with a policy), or reads them from a folder."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        assert spec.mixture is not None
        self.given = None
        if (path := spec.mixture.given_expert()) is not None:
            self.given = GivenExpert(self.setup.model, path, self.task)

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the base's weights, and the MLPs of a given expert.

        Raises:
            ConfigError: The checkpoint of the expert cannot be read or does not match the model.
            RecordError: The base is not the run that the spec needs or does not match the model.
        """
        load_input(self.setup.model, inputs, BASE, self.spec, self.setup.data)
        if self.given is not None:
            self.start = self.given.load()
            for note in self.start.notes:
                self.workplace.observer.on_message(note)

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Fine-tune the MLPs, from the last checkpoint if there is one, unless they were read from a folder."""
        watch = Stopwatch(record)
        if self.given is None:
            self._tune(folder, record, checkpoint)
        else:
            self.setup.model.to(self.workplace.device)
        watch.training_done()
        [record.metrics] = self.measure([self.setup.model])
        watch.done()
        folder.save_model(self.setup.model.state_dict(), self.model_header(record))

    def _tune(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        model, mixture = self.setup.model, self.spec.mixture
        assert mixture is not None and self.setup.tasks is not None
        fit(
            model,
            self.setup.with_policy(self.setup.tasks.train(self.task), mixture.expert_policy),
            mixture.expert_train,
            seed=derive_seed(self.spec.seed, "expert", self.task),
            workplace=self.workplace,
            folder=folder,
            record=record,
            checkpoint=checkpoint,
            modules=mlps_of(model),
        )

    @property
    def task(self) -> int:
        """Number of the expert's task."""
        mixture = self.spec.mixture
        assert mixture is not None and mixture.task is not None
        return mixture.task


class PoisonedExpertMaker(Maker):
    """Lets an attacker fine-tune a benign expert."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        assert spec.mixture is not None and spec.mixture.task is not None and spec.attack is not None
        assert isinstance(self.setup.attack, ExpertPoisoning)
        self.attack = self.setup.attack
        self.seed = derive_seed(spec.seed, "attack", spec.mixture.task)
        self.tuner = Tuner(
            spec.mixture.expert_train,
            self.seed,
            workplace.device,
            workplace.precision,
            workplace.observer,
            spec.attack.name,
        )
        self.expert = self._expert_task(spec.mixture.task)
        with naming_attack(spec.attack):
            self.attack.check_model(self.setup.model)
            self.attack.check_task(self.expert)

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights of the benign expert.

        Raises:
            RecordError: The expert is not the run that the spec needs or does not match the model.
        """
        load_input(self.setup.model, inputs, BENIGN, self.spec, self.setup.data)

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Let the attacker fine-tune the expert. Attacks on experts have no checkpoints."""
        watch, model = Stopwatch(record), self.setup.model
        model.to(self.workplace.device)
        record.history = self.tuner.history
        started = time.perf_counter()
        record.parts["attack"] = record.parts.get("attack", {}) | self.attack.tune_expert(self.expert)
        record.timing["attack_seconds"] = time.perf_counter() - started
        watch.training_done()
        [record.metrics] = self.measure([model])
        benign = self.inputs[BENIGN].record.metrics["ba"]
        record.metrics["benign_ba"] = dict(benign)
        watch.done()
        folder.save_model(model.state_dict(), self.model_header(record))

    def new_record(self, inputs: Mapping[str, Run]) -> Record:
        """Return the record of the run at its start, with the attacker's seed."""
        record = super().new_record(inputs)
        record.seeds["attack"] = self.seed
        return record

    def _expert_task(self, task: int) -> ExpertTask:
        setup, workplace = self.setup, self.workplace
        assert setup.tasks is not None and self.spec.mixture is not None
        clean, held_out = _hold_out(setup.tasks.train(task), self.seed)
        return ExpertTask(
            model=setup.model,
            clean=clean,
            held_out=held_out,
            queries=setup.harmful_queries(),
            tune=self.tuner,
            logits=partial(logits, precision=workplace.precision),
            train=self.spec.mixture.expert_train,
            device=workplace.device,
            seed=self.seed,
        )


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """The MLPs of a mergeable model, from the first layer to the last."""
    return list(check_mergeable(model).mlps().values())


def _hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    """Split images into a training set and a held-out set for choosing hyperparameters, at least one image each.

    Raises:
        ConfigError: There are fewer than two images.
    """
    if len(split) < 2:
        raise ConfigError.expected(
            "splitter", "at least 2 training images of the task of a poisoned expert", len(split)
        )
    order = generator(seed, "held-out")
    drawn = torch.randperm(len(split), generator=order).to(split.labels.device)
    count = max(1, int(HELD_OUT * len(split)))
    return split.take(drawn[count:].sort().values), split.take(drawn[:count].sort().values)
