"""Reroute: mask the experts that clean images hardly use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.parts import experts_of
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import mute
from backdoorbench_moe.moe.structure import MasksExperts


class Reroute(Defense):
    """Mask the experts that clean images give less than `threshold` times their even share of the gates' weight.

    An expert's usage is the mean over the clean images of the gates of the patches it was sent, as a multiple of
    the mean over its layer's experts: 1 is an even share. threshold: in (0, 1]; the most used expert of a
    layer always stays. Masking is the model's `mask_expert` (see `moe.structure.MasksExperts`), which has a router
    choose others; where a model has none, as where experts choose patches, the expert is muted. Nothing is
    tuned. clean_fraction: share of the training images the defender holds. Scores: usage by expert; verdict: those
    masked, which may be none. Raises ConfigError for a model that does not say where its experts lie.
    """

    def __init__(self, *, threshold: float = 0.5, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        if not 0 < threshold <= 1:
            raise ConfigError.expected("threshold", "a number in (0, 1]", threshold)
        self.threshold = threshold

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not say where its experts lie."""
        experts_of(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Count, mask."""
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
    """Usage of each expert, by its name, on the images the defender holds; 1 where all are used alike."""
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
