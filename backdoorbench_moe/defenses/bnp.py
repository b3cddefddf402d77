"""BNP: prune channels whose running statistics differ from those of clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.defenses.outlying import (
    Group,
    check_deviations,
    groups_of,
    judge_groups,
    pruned_channels,
)
from backdoorbench_moe.defenses.requirements import experts_of, treats_experts
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.norms import batch_norms, input_moments

# Variances are at least this large, so that a channel that never varies has a finite divergence.
SMALLEST = 1e-12


class BNP(Defense):
    """Batch norm statistics-based pruning: prune channels whose inputs differ between clean images and training images.

    The training set contained triggered images; the defender's images do not. A channel's score is the
    Kullback-Leibler divergence of the normal distribution of its inputs for the defender's images from the one given by
    the running statistics: ln(s / b) + (b^2 + (m_b - m_s)^2) / (2 s^2) - 1/2, with mean m_b and standard deviation b
    for the images, and the running statistics m_s and s. Channels with a score above mean + `u` standard deviations of
    their norm are pruned: the scale is set to zero, and the shift is kept, as in the original. Nothing is trained.

    The model needs batch norms with running statistics; layer norms have none. Norms that are not called in evaluation
    mode, such as those of an auxiliary head, are left out.

    Departure: the original measures one batch; here, all of the defender's images are used.

    Args:
        u: Number of standard deviations above the mean beyond which a channel is pruned, above 0. Of n channels, none
            can be more than (n - 1) / sqrt(n) above their mean, so with `u` of 3 nothing is pruned in groups of fewer
            than 11; the judgement lists such groups as "too_small".
        experts: Whether channels are compared only with others of the same expert. An additional judgement then states,
            for each expert, the number of patches of the images that were routed to it: the fewer, the less certain are
            the statistics of its norms. In pMoE, the inputs of an expert's norm, and thus its running statistics, also
            include zeros for all other patches. False: as in the original, which has no experts. None: True if the
            model names its experts.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, or the model has no batch norms with running statistics.

    Source:
        Zheng et al., "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022, section 4.3, and its code
        RJ-T/NIPS2022_EP_BNP.
    """

    tiny: ClassVar[Mapping[str, object]] = {"u": 1.0}

    def __init__(self, *, u: float = 3.0, experts: bool | None = None, clean_fraction: float = 0.05) -> None:
        super().__init__(clean_fraction=clean_fraction)
        self.u, self.experts = u, experts
        check_deviations(u, [10**9])

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no batch norms with running statistics, or too few channels for `u`."""
        experts = treats_experts(model, self.experts)
        norms = batch_norms(model)
        if not norms:
            raise ConfigError(
                f"model: {type(model).__name__} has no batch norms with running statistics, "
                "which are compared with those of clean images"
            )
        zeros = {name: torch.zeros(norm.num_features) for name, norm in norms.items()}
        check_deviations(self.u, [len(group.scores) for group in _groups(model, zeros, experts)])

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Measure the statistics of the norms, and how many patches each expert receives."""
        return Cost(predicted=(1 + treats_experts(model, self.experts)) * held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Measure the statistics of the clean images, and prune the outliers."""
        model, experts = task.model, treats_experts(task.model, self.experts)
        norms = batch_norms(model)
        found = input_moments(list(norms.values()), lambda: task.logits(model, task.clean.images))
        scores, counts = {}, {}
        for name, norm in norms.items():
            if norm not in found:
                continue
            mean, variance, counts[name] = found[norm]
            assert norm.running_mean is not None and norm.running_var is not None
            scores[name] = normal_divergence(mean, variance, norm.running_mean, norm.running_var)
        groups = _groups(model, scores, experts)
        details: dict[str, Any] = {"images": len(task.clean), "values": counts}
        judgements = [judge_groups(groups, self.u, "divergence from the stored statistics", details)]
        if experts:
            judgements.append(self._judge_experts(task, groups))
        with torch.no_grad():
            for name, channels in pruned_channels(groups, self.u).items():
                norms[name].weight[channels] = 0
        return DefenseResult("pruned", model, tuple(judgements))

    def _judge_experts(self, task: DefenseTask, groups: list[Group]) -> Judgement:
        """Return the highest deviation of each expert's channels, and the number of patches that were routed to it."""
        layers: dict[str, Tensor] = {}
        for batch in task.routing(task.model, task.clean.images):
            for routing in batch:
                layers[routing.layer] = layers.get(routing.layer, 0) + routing.selected.sum((0, 2)).cpu()
        experts = experts_of(task.model)
        own = {e.name: [g.most() for g in groups if g.expert == e.name] for e in experts}
        return Judgement(
            "expert",
            f"a channel of the expert is more than {self.u:g} standard deviations above the mean of the expert's",
            scores={name: max(found) for name, found in own.items() if found},
            threshold=self.u,
            suspicious=[name for name, found in own.items() if found and max(found) > self.u],
            details={"patches": {e.name: int(layers[e.layer][e.index]) for e in experts}},
        )


def normal_divergence(mean: Tensor, variance: Tensor, stored_mean: Tensor, stored_variance: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of one normal distribution from another.

    Args:
        mean: (C,), means of the distribution that diverges.
        variance: (C,), its variances.
        stored_mean: (C,), means of the distribution that it diverges from.
        stored_variance: (C,), its variances.

    Returns:
        (C,) float64 in nats, not negative. Variances below 1e-12 count as 1e-12.
    """
    own, stored = variance.double().clamp(min=SMALLEST), stored_variance.double().clamp(min=SMALLEST)
    distance = (mean.double() - stored_mean.double()) ** 2
    return ((stored / own).log() + (own + distance) / stored - 1).clamp(min=0) / 2


def _groups(model: nn.Module, scores: Mapping[str, Tensor], experts: bool) -> list[Group]:
    return [
        group for name, values in scores.items() for group in groups_of(model, name, values, experts=experts)
    ]
