"""Defend the model of a finished run, and measure it before the defense and after each stage."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from backdoorbench_moe.config import RunSpec, TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.defenses.base import DefenseResult, DefenseTask
from backdoorbench_moe.engine.build import build_gate, describe, fresh_model, merge_copies
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.graph import PARENT, needs
from backdoorbench_moe.engine.inference import features, logits, losses, routings
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint
from backdoorbench_moe.engine.makers.inputs import load_input
from backdoorbench_moe.engine.measuring.consistency import check_same
from backdoorbench_moe.engine.measuring.evaluate import Metrics
from backdoorbench_moe.engine.measuring.filtering import measure_filtered
from backdoorbench_moe.engine.measuring.judging import measure_class_judgements, save_judgements
from backdoorbench_moe.engine.measuring.samples import measure_samples
from backdoorbench_moe.engine.poisoning.learned import keep_trigger, restore_trigger
from backdoorbench_moe.engine.poisoning.poison import poisoned, stamp_places
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.setups.defenses import build_defenses
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import PluginError, naming
from backdoorbench_moe.ops.images import concatenate
from backdoorbench_moe.ops.seeding import derive_seed, generator, seeded
from backdoorbench_moe.ops.stored_images import replaced
from backdoorbench_moe.records import Record, RunFolder

# Name of the first stage, the model before the defense.
BEFORE = "before"


class Stages:
    """Copies of the model after each stage, which are measured after the defense has returned.

    Attributes:
        kept: (name, copy of the model, duration in seconds) of each stage.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[str, nn.Module, float]] = []
        self._since = time.perf_counter()

    def add(self, name: str, model: nn.Module) -> None:
        """Copy the model after a stage. Raises PluginError if the name is not a string, empty or already used."""
        now = time.perf_counter()
        if not isinstance(name, str) or not name or name in (BEFORE, *(kept for kept, *_ in self.kept)):
            raise PluginError(f"defense: expected a new name for a stage, got {name!r}")
        self.kept.append((name, copy.deepcopy(model), now - self._since))
        self._since = time.perf_counter()


class DefenseMaker(Maker):
    """Applies the last defense of a spec to the model of its parent run."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        self.defense = build_defenses(spec, self.setup)[-1]
        self.seed = derive_seed(spec.seed, "defense", len(spec.defenses) - 1)
        self.model = self.setup.model
        self.before: Metrics | None = None

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the parent's weights, and measure the model before the defense.

        Raises:
            RecordError: The parent is not the run that the spec needs, has other data, or has weights that do not match
                the model; or its model no longer has the metrics in its record.
        """
        parent = inputs[PARENT]
        load_input(self.model, inputs, PARENT, self.spec, self.setup.data)
        restore_trigger(self.setup.stamper, parent.folder, parent.record)
        self.model.eval().to(self.workplace.device).to(memory_format=torch.channels_last)
        if self.before is None:
            [self.before] = self.measure([self.model], recovery=True)
            check_same(
                parent, self.before, precision=self.workplace.precision, environment=self.environment()
            )

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Defend the model, measure every stage and save the last one. Defenses have no checkpoints."""
        started = time.perf_counter()
        if self.setup.plan is not None and self.setup.tasks is None:
            folder.save_poison({name: group.numpy() for name, group in self.setup.plan.groups.items()})
        keep_trigger(self.setup.stamper, folder, record)
        stages, tuner = Stages(), self._tuner()
        record.history = tuner.history
        result = self._defend(stages, tuner)
        evaluated = time.perf_counter()
        names, kept, seconds = zip(*stages.kept, strict=True)
        assert self.before is not None
        metrics = [self.before, *self._measure_stages(kept, result)]
        record.judgements = save_judgements(result.judgements, folder)
        metrics[-1] |= self._measure_judgements(result, record)
        record.stages = [
            {"name": name, "metrics": found, "seconds": taken}
            for name, found, taken in zip((BEFORE, *names), metrics, (0.0, *seconds), strict=True)
        ]
        record.metrics = dict(metrics[-1])
        record.timing["defense_seconds"] = sum(seconds)
        if record.history:
            spent = sum(row["seconds"] for row in record.history)
            record.timing |= {"train_seconds": spent, "images_per_second": tuner.images / spent}
        record.timing["evaluate_seconds"] = time.perf_counter() - evaluated
        record.timing["total_seconds"] = time.perf_counter() - started
        folder.save_model(kept[-1].state_dict(), self.model_header(record))

    def _measure_judgements(self, result: DefenseResult, record: Record) -> Metrics:
        """Measure the accuracy of judgements about classes and training samples; no metrics for texts."""
        setup = self.setup
        if not isinstance(setup, ImageSetup):
            return {}
        metrics = measure_class_judgements(result.judgements, setup.triggered_test(), setup.num_classes)
        if setup.tasks is None:
            samples = len(setup.images.train)
            metrics |= measure_samples(result.judgements, record.judgements, setup.plan, samples)
        return metrics

    def _measure_stages(self, kept: Sequence[nn.Module], result: DefenseResult) -> list[Metrics]:
        """Measure the model of each stage. If there is an input filter, the last stage is measured with the filter.

        Args:
            kept: The models of the stages after "before".
            result: The result of the defense.
        """
        judgement = result.filter
        if judgement is None:
            return self.measure(kept, recovery=True)
        workplace, spec, setup = self.workplace, self.spec, self.setup
        if not isinstance(setup, ImageSetup):
            raise PluginError(f"defense {spec.defenses[-1].name!r}: expected no filter of inputs for texts")
        metrics = self.measure(kept[:-1], recovery=True)
        workplace.observer.on_message(f"measuring the filter of {spec.defenses[-1].name}")
        naming_it = naming(f"defense {spec.defenses[-1].name!r}")
        with naming_it, reproducible(workplace.device), seeded(self.seed, "filter noise"):
            filtered = measure_filtered(
                kept[-1],
                setup.test,
                setup.triggered_test(),
                judgement,
                safe=setup.safe_answers(),
                seed=spec.seed,
                precision=workplace.precision,
                tasks=None if setup.tasks is None else [len(test) for test in setup.tasks.tests()],
            )
        return [*metrics, filtered]

    def _defend(self, stages: Stages, tuner: Tuner) -> DefenseResult:
        """Run the defense on a task without information about the attack."""
        workplace, setup = self.workplace, self.setup
        given = setup.data.model_options
        task = DefenseTask(
            model=self.model,
            num_classes=setup.num_classes,
            image_size=setup.image_size,
            train=self._recipe(),
            gate_train=None if self.spec.mixture is None else self.spec.mixture.gate_train,
            device=workplace.device,
            precision=workplace.precision,
            seed=self.seed,
            tune=tuner,
            logits=partial(logits, precision=workplace.precision),
            routing=partial(routings, precision=workplace.precision),
            fresh=partial(fresh_model, self.spec.model, given, self.seed, workplace.device, self._merge()),
            report=stages.add,
            progress=partial(workplace.observer.on_progress, self.spec.defenses[-1].name),
            granted=self._grants(),
        )
        before = _shapes(self.model)
        with reproducible(workplace.device), seeded(self.seed, "noise"):
            result = self.defense(task)
        if _shapes(result.model) != before:
            raise PluginError(
                f"defense {self.spec.defenses[-1].name!r}: expected a model of the same architecture"
            )
        if names := [name for name, tensor in result.model.state_dict().items() if tensor.isnan().any()]:
            raise PluginError(
                f"defense {self.spec.defenses[-1].name!r}: expected a model without NaN, found it in {names[0]}"
            )
        stages.add(result.stage, result.model.eval())
        return result

    def _merge(self) -> Callable[[nn.Module], nn.Module] | None:
        """Return a function that converts a fresh dense model to a mixture; None if the model is not a mixture."""
        if not self.setup.is_mixture:
            return None
        assert self.spec.mixture is not None
        return partial(merge_copies, experts=self.spec.mixture.experts, gate=build_gate(self.spec))

    def _grants(self) -> dict[str, Any]:
        """Return the data and functions that the defense requests in `needs`, by name."""
        needs, precision = self.defense.needs, self.workplace.precision
        grants: dict[str, Callable[[], Any]] = {
            "clean": self._clean_images,
            "training-set": self._training_set,
            "features": lambda: partial(features, precision=precision),
            "losses": lambda: partial(losses, precision=precision),
            "tasks": self._task_images,
        }
        found = {need: grant() for need, grant in grants.items() if need in needs}
        if "marked" in needs:
            found["marked"], unsafe = self.setup.defenders_queries(self._count(), self.seed)
            if unsafe is not None:
                found["unsafe"] = unsafe
        return found

    def _count(self) -> int:
        """Number of training images or texts that the defender has; for a mixture, before it is divided by tasks."""
        return self.defense.count(len(self.setup.data.train), self.setup.num_classes)

    def _held(self) -> int:
        """Number of training images or texts that the defender has, the same for each task of a mixture if possible."""
        tasks, count = self.setup.tasks, self._count()
        if tasks is None or not count:
            return count
        return sum(min(self._each(), len(tasks.train(task))) for task in tasks.numbers)

    def _each(self) -> int:
        """Number of training images or texts per task of a mixture that the defender has if the task has as many."""
        assert self.setup.tasks is not None
        return max(1, self._count() // len(self.setup.tasks.numbers))

    def _training_set(self) -> Split:
        """Return a copy of the training set of the victim, including poisoned images and labels."""
        train, plan = self.workplace.images.train, self.setup.plan
        if plan is None:
            return train.copy()
        with poisoned(train, plan, self.setup.stamper) as split:
            return split.copy()

    def _clean_images(self) -> Split:
        """Return copies of the training images that the defender has, with their true labels.

        For "notebook" data, images in the poison group contain the trigger; see `Defense`.
        """
        setup = self.setup
        if setup.tasks is not None:
            return concatenate(self._task_images())
        stamper, plan, train = setup.stamper, setup.plan, setup.images.train
        order = torch.randperm(len(train), generator=generator(self.seed, "clean"))
        keep = order[: self._count()].sort().values
        place = keep.to(train.images.device)
        held = train.images[place]
        if self.defense.finetune_data == "notebook" and plan is not None and stamper is not None:
            stamped = torch.isin(keep, plan.indices).to(held.device)
            marked = stamp_places(held[stamped], place[stamped], stamper.training)
            held = replaced(held, stamped.nonzero().squeeze(1), marked)
        return Split(held, train.labels[place])

    def _task_images(self) -> list[Split]:
        """Return the defender's training images or texts for each task of a mixture, an equal number per task."""
        tasks = self.setup.tasks
        assert tasks is not None
        held = []
        for task in tasks.numbers:
            split = tasks.train(task)
            order = torch.randperm(len(split), generator=generator(self.seed, "clean", task))
            place = order[: self._each()].sort().values.to(split.labels.device)
            held.append(Split(split.images[place], split.labels[place]))
        return held

    def _recipe(self) -> TrainSpec:
        mixture = self.spec.mixture
        return self.spec.train if mixture is None else mixture.expert_train

    def _tuner(self) -> Tuner:
        workplace, name = self.workplace, self.spec.defenses[-1].name
        return Tuner(
            self._recipe(), self.seed, workplace.device, workplace.precision, workplace.observer, name
        )

    def required_metrics(self) -> set[str]:
        """Return the metrics that the record of a defended run must have."""
        return {"ba", *(self.setup.defended_metrics if self.spec.attacked else ())}

    def new_record(self, inputs: Mapping[str, Run]) -> Record:
        """Return the record of the run at its start, with the defense's options, seed and number of images or texts."""
        record = super().new_record(inputs)
        record.parts["defense"] = describe(self.defense)
        record.data["clean_texts" if record.is_text else "clean_images"] = self._held()
        record.seeds["defense"] = self.seed
        return record

    def model_header(self, record: Record) -> dict[str, str]:
        """Return the metadata of the model file, including the names of the defenses and of the parent's folder."""
        names = ", ".join(part.name for part in self.spec.defenses)
        return {**super().model_header(record), "defended_by": names, "parent": needs(self.spec)[PARENT].name}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
