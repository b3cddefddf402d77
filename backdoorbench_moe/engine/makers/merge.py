"""Merge experts into a mixture, and train or set its gates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import MixtureSpec, RunSpec
from backdoorbench_moe.engine.build import build_gate
from backdoorbench_moe.engine.device import reproducible
from backdoorbench_moe.engine.graph import BASE, expert_role
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint, Stopwatch, fit
from backdoorbench_moe.engine.makers.inputs import check_expert, check_tuned, read_input
from backdoorbench_moe.engine.makers.probe import Probe, check_probe
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.moe.layers import Router
from backdoorbench_moe.moe.merging import expert_names, mlp_inputs
from backdoorbench_moe.moe.structure import Merged
from backdoorbench_moe.ops.images import Split, batches
from backdoorbench_moe.ops.seeding import derive_seed, generator
from backdoorbench_moe.records import Record, RunFolder

# Number of images of each task for setting gates that are not trained.
STATE_IMAGES = 1000


class MergeMaker(Maker):
    """Merges the experts of a mixture with their base, and trains the gates, or sets them from hidden states."""

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        super().__init__(spec, workplace)
        self.model, self.gate = self.setup.model, build_gate(spec)
        check_probe(spec, self.setup)
        assert self.setup.tasks is not None
        self.setup.tasks.count_mixed(self.mixture.gate_images)

    @property
    def mixture(self) -> MixtureSpec:
        """The settings of the mixture."""
        assert self.spec.mixture is not None
        return self.spec.mixture

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Merge the weights of the base and of the experts.

        Raises:
            RecordError: An input is not the run that the spec needs, or an expert was fine-tuned from another base.
        """
        data = self.setup.data
        base = read_input(inputs, BASE, self.spec, data)
        names = expert_names(inputs[BASE].model())
        experts = []
        for e in range(self.mixture.experts):
            run = inputs[expert_role(e)]
            check_expert(run, inputs[BASE])
            experts.append(read_input(inputs, expert_role(e), self.spec, data))
            check_tuned(experts[-1], base, names, run)
        self._merged().load_experts(base, experts)

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Train the gates, from the last checkpoint if there is one, or set them from hidden states."""
        watch, device = Stopwatch(record), self.workplace.device
        self.model.to(device).to(memory_format=torch.channels_last)
        probe = Probe(self.setup, self.workplace.precision, folder) if self.spec.probe else None
        if self.gate.trained:
            assert self.setup.tasks is not None
            fit(
                self.model,
                self.setup.tasks.mixed(self.mixture.gate_images),
                self.mixture.gate_train,
                seed=derive_seed(self.spec.seed, "gates"),
                workplace=self.workplace,
                folder=folder,
                record=record,
                checkpoint=checkpoint,
                modules=self._merged().routers(),
                probe=probe,
            )
        else:
            if probe is not None:
                probe.begin(self.model, 0)
            with reproducible(device):
                self._set_gates()
            if probe is not None:
                probe.look(self.model)
        watch.training_done()
        [record.metrics] = self.measure([self.model])
        watch.done()
        folder.save_model(self.model.state_dict(), self.model_header(record))

    def _merged(self) -> Merged:
        assert isinstance(self.model, Merged)
        return self.model

    def _set_gates(self) -> None:
        """Set every router from the mean hidden states of the base on each task."""
        tasks = self.setup.tasks
        assert tasks is not None
        base = self.inputs[BASE].model().to(self.workplace.device).to(memory_format=torch.channels_last)
        states = [self._mean_states(base, self._drawn(tasks.train(e), e)) for e in tasks.numbers]
        for router, each in zip(self._merged().routers(), torch.stack(states, 1), strict=True):
            assert isinstance(router, Router)
            self.gate.set_from_states(router, each)

    def _drawn(self, split: Split, task: int) -> Split:
        order = torch.randperm(len(split), generator=generator(self.spec.seed, "states", task))
        return split.take(order[: self.mixture.gate_images or STATE_IMAGES].to(split.labels.device))

    @torch.no_grad()
    def _mean_states(self, base: nn.Module, split: Split) -> Tensor:
        """The mean input of each MLP of the base over the tokens of all images or texts, (layers, D) float32."""
        sums: Tensor | float = 0.0
        for batch in batches(split):
            with mlp_inputs(base) as found:
                forward(base.eval(), batch.images, precision=self.workplace.precision)
            weights = self.setup.token_weights(batch)
            sums = sums + torch.stack([_token_mean(each.float(), weights).sum(0) for each in found.values()])
        assert isinstance(sums, Tensor)
        return sums / len(split)


def _token_mean(states: Tensor, weights: Tensor | None) -> Tensor:
    """The mean (B, D) over tokens (B, N, D), or their weighted sum with weights (B, N)."""
    return states.mean(1) if weights is None else (weights.unsqueeze(-1) * states).sum(1)
