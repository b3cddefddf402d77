"""Reroute: mask the experts that clean images use least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.requirements import experts_of
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.moe.structure import MasksExperts


class Reroute(Defense):
    """Mask the experts whose usage by clean images is below a threshold.

    The usage of an expert is the mean, over the clean images, of the sum of the gates of the patches that it selected,
    divided by the mean of the same over all experts of its layer: 1 is an even share. The most used expert of a layer
    is never masked. A model with `mask_expert` (see `moe.structure.MasksExperts`) is asked to mask, so that its router
    chooses other experts. In all other models, such as those in which experts choose patches, the expert is muted.
    Nothing is tuned. The judgement's scores are the usages; possibly no expert is suspicious.

    Args:
        threshold: Usage below which an expert is masked, in (0, 1].
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the model does not have the protocol `WithExperts`.
    """

    def __init__(self, *, threshold: float = 0.5, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if not 0 < threshold <= 1:
            raise ConfigError.expected("threshold", "a number in (0, 1]", threshold)
        self.threshold = threshold

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not name its experts."""
        experts_of(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Measure the usage of all experts, and mask the rarely used ones."""
        model, experts = task.model, experts_of(task.model)
        usage = expert_usage(task)
        most = {
            layer: max((name for name in usage if name.rpartition("/")[0] == layer), key=lambda n: usage[n])
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
        Usage by name of the expert, from 0; its mean over the experts of a layer is 1.
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
