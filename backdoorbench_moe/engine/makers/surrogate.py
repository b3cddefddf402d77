"""Optimise the trigger of a run on its surrogate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.build import build_model, cut, spread
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.graph import SURROGATE, needs
from backdoorbench_moe.engine.makers.inputs import load_input
from backdoorbench_moe.engine.names import check_surrogate_name
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.triggers.optimised import OptimisedTrigger, SurrogateTask


class TriggerOptimisation:
    """The optimisation of a run's trigger.

    Args:
        spec: The spec of the run.
        setup: The parts of the run; the stamper's trigger is an `OptimisedTrigger`.
        workplace: The data, the device and the observer.

    Raises:
        ConfigError: The surrogate does not exist, or the trigger cannot be optimised on it.
    """

    def __init__(self, spec: RunSpec, setup: Setup, workplace: Workplace) -> None:
        assert setup.stamper is not None and isinstance(setup.stamper.trigger, OptimisedTrigger)
        self.spec, self.setup, self.workplace = spec, setup, workplace
        self.trigger = setup.stamper.trigger
        check_surrogate_name(spec)
        self.model = build_model(needs(spec)[SURROGATE], setup.data.model_options)
        self.trigger.check(self._task())

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights of the surrogate.

        Raises:
            RecordError: The surrogate is not the run that the spec needs, or its model was replaced.
        """
        load_input(self.model, inputs, SURROGATE, self.spec, self.setup.images)

    def run(self) -> dict[str, float]:
        """Optimise the trigger and set its state.

        Returns:
            Metrics of the trigger on the surrogate after the optimisation and, with the suffix "_before", before it;
            see `OptimisedTrigger.assess`.
        """
        task, trigger, part = self._task(), self.trigger, self.spec.trigger
        assert part is not None
        name = needs(self.spec)[SURROGATE].name
        self.workplace.observer.on_message(f"optimising the trigger {part.name} on {name}")
        with reproducible(self.workplace.device), seeded(trigger.seed, "optimise"):
            with torch.no_grad():
                before = trigger.assess(task)
            with torch.enable_grad():
                state = trigger.optimise(task)
            trigger.load_state({key: value.cpu() for key, value in state.items()})
            with torch.no_grad():
                after = trigger.assess(task)
        return {f"{key}_before": value for key, value in before.items()} | after

    def _task(self) -> SurrogateTask:
        setup, attack = self.setup, self.setup.attack
        assert setup.stamper is not None and setup.plan is not None and attack is not None
        model = self.model.to(self.workplace.device).to(memory_format=torch.channels_last)
        poison, applicator = attack.poison, setup.stamper.applicator
        return SurrogateTask(
            model=model.eval().requires_grad_(False),
            images=setup.images.train.images,
            labels=setup.images.train.labels,
            stamped=torch.cat([setup.plan.indices, setup.plan.cover]).sort().values,
            target=poison.target if poison.mapping == "all-to-one" else None,  # type: ignore[arg-type]
            stamp=applicator,
            cut=partial(cut_with_places, applicator),
        )


def cut_with_places(applicator: Applicator, images: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """See `SurrogateTask.cut`."""
    canvases = cut(applicator, images)
    return canvases, spread(places, canvases)
