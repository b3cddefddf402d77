"""Reroute: mask the experts that clean images use least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import experts_of
from backdoorbench_moe.moe.experts import active_experts, mute
from backdoorbench_moe.moe.structure import MasksExperts
from backdoorbench_moe.ops.ranges import check_interval


class Reroute(Defense):
    """Mask the experts whose usage by clean images is below a threshold.

    The usage of an expert is the sum of the gates of all patches that it processes in the clean images, divided by the
    mean of this sum over the experts of its layer. It is 1 for every expert if all are used equally.

    If the model has the method `mask_expert` (see `moe.structure.MasksExperts`), its router then chooses other experts.
    In other models, the expert is muted instead, so that its output has no effect on the logits. Of the experts of a
    layer that no earlier defense has muted or masked, the most used one is never masked. The model is not trained
    further. The scores of the judgement are the usages. If no usage is below the threshold, nothing is masked.

    Args:
        threshold: Usage below which an expert is masked, in (0, 1].
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range; or, when the model is checked, it does not implement the protocol
            `WithExperts`.

    Source:
        Ours.
    """

    def __init__(self, *, threshold: float = 0.5, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_interval("threshold", threshold, "(0, 1]")
        self.threshold = threshold

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model is not a routed model that implements the protocol `WithExperts`."""
        experts_of(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Measure the usage on the defender's images once."""
        return Cost(predicted=held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Measure the usage of all experts, and mask those below the threshold."""
        model, experts = task.model, active_experts(task.model, experts_of(task.model))
        usage = expert_usage(task)
        most = {
            layer: max((e.name for e in experts if e.layer == layer), key=lambda name: usage[name])
            for layer in dict.fromkeys(expert.layer for expert in experts)
        }
        rare = [e for e in experts if usage[e.name] < self.threshold and e.name != most[e.layer]]
        for expert in rare:
            if isinstance(model, MasksExperts):
                model.mask_expert(expert)
            else:
                mute(model, [expert])
        judged = Judgement(
            "expert",
            "usage by clean images, as a multiple of an even share, is below the threshold",
            scores=usage,
            threshold=self.threshold,
            suspicious=[expert.name for expert in rare],
        )
        return DefenseResult("rerouted", model, (judged,))


def expert_usage(task: DefenseTask) -> dict[str, float]:
    """Measure the usage of each expert on the images that the defender holds.

    Returns:
        Usage by name of the expert, not negative. Its mean over the experts of a layer is 1.
    """
    sums: dict[str, Tensor] = {}
    for batch in task.routing(task.model, task.clean.images):
        for routing in batch:
            mass = (routing.gates.double() * routing.selected).sum((0, 2))
            sums[routing.layer] = sums.get(routing.layer, torch.zeros_like(mass)) + mass
    usage: dict[str, float] = {}
    for layer, mass in sums.items():
        total = mass.mean().clamp(min=torch.finfo(mass.dtype).tiny)
        usage |= {f"{layer}/{index}": value for index, value in enumerate((mass / total).tolist())}
    return usage
