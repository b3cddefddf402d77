"""Fine-pruning: zero the channels that clean images activate least, then tune on clean images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.requirements import check_tuning, structure
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.pruning import channel_means, kept_silent, lowest, silence
from backdoorbench_moe.moe.structure import ChannelGroup
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.shares import share_of, smallest_share

Ranking = Literal["post-relu", "notebook"]


class FinePruning(Defense):
    """Prune the channels that clean images activate least, then fine-tune on clean images.

    The channels are those of the last convolution; in a mixture of experts, of the last convolution of each expert. In
    a transformer, they are the hidden units of the last MLP, or of each expert in the last MoE layer. Pruned channels
    stay zero during tuning.

    Departures: the original prunes channels until the accuracy on held-out images falls below a limit; here, a fixed
    share is pruned, as in BadPatches. The original ranks channels on held-out images; here, they are ranked on the
    defender's images, which are training images without the attacker's changes (unless `finetune_data` is "notebook").

    Args:
        ratio: Share of the channels of each group that are pruned, in [0, 1); floor(ratio * channels) are. It is 0.1,
            0.2 or 0.3 in BadPatches.
        ranking: Which channels are pruned. "post-relu": those with the lowest mean activation after norm and ReLU, as
            in the paper; the norm's channel is set to zero as well, so that the activation is zero. If no norm has the
            same channels, the activation is the convolution's output after a ReLU. Hidden units of an MLP are measured
            at the input of its activation function. "notebook": those with the lowest signed mean of the convolution's
            output before the norm, as in the BadPatches notebook; only the convolution's channel is set to zero, which
            the norm turns into a constant.
        scope: Which channels are candidates. "experts": the last convolution of each expert. "trunk": the last
            convolution before the experts, or of a model without experts. "all": both. None: "experts" if the model has
            any, otherwise "trunk".
        epochs: Epochs of tuning, from 0; with 0, channels are only pruned.
        lr: Peak learning rate, above 0; that of the run's recipe if None.
        clean_fraction: Share of the training images that the defender holds, in (0, 1]; 1.0 in the BadPatches paper.
        finetune_data: The images that the defender holds: "clean", as they were before the attack; or "notebook", in
            which the poisoned images contain the trigger and have their true labels, as in the BadPatches notebook.

    Raises:
        ConfigError: A value is out of range, the model does not have the scope, or the ratio prunes no channel of a
            group.

    Source:
        Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018; BadPatches
        (arXiv 2505.01811), section 5, and its notebooks.
    """

    tuning_length: ClassVar[str | None] = "epochs"
    tiny: ClassVar[Mapping[str, object]] = {"ratio": 0.25, "epochs": 1}

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        ranking: Ranking = "post-relu",
        scope: Literal["experts", "trunk", "all"] | None = None,
        epochs: int = 5,
        lr: float | None = None,
        clean_fraction: float = 0.05,
        finetune_data: Literal["clean", "notebook"] = "clean",
    ) -> None:
        super().__init__(clean_fraction=clean_fraction, finetune_data=finetune_data)
        check_interval("ratio", ratio, "[0, 1)")
        check_tuning(epochs, lr, at_least=0)
        self.ratio, self.ranking, self.scope, self.epochs, self.lr = ratio, ranking, scope, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no such channels, or the ratio prunes none of them."""
        self._groups(model)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Rank the channels on the defender's images once, then tune."""
        return Cost(trained=self.epochs * held, predicted=held)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Rank the channels, prune the lowest, and tune."""
        groups = self._groups(task.model)
        scores = rank_channels(groups, self.ranking, run=lambda: task.logits(task.model, task.clean.images))
        pruned: list[tuple[nn.Module, Tensor]] = []
        for group, score in zip(groups, scores, strict=True):
            channels = group.start + lowest(score, share_of(self.ratio, len(group)))
            pruned.append((group.layer, channels))
            if self.ranking == "post-relu" and group.norm is not None:
                pruned.append((group.norm, channels))
        for module, channels in pruned:
            silence(module, channels)
        if not self.epochs:
            return DefenseResult("pruned", task.model)
        task.report("pruned", task.model)
        with kept_silent(pruned):
            task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr)
        return DefenseResult("tuned", task.model)

    def _groups(self, model: nn.Module) -> list[ChannelGroup]:
        prunable = structure(model).prunable()
        if not prunable:
            raise ConfigError(f"scope: {type(model).__name__} has no channels that can be pruned")
        scope = self.scope or ("experts" if "experts" in prunable else "trunk")
        if scope != "all" and scope not in prunable:
            raise ConfigError.expected(
                "scope", f"one of {[*prunable, 'all']} for {type(model).__name__}", scope
            )
        groups = [group for name in prunable for group in prunable[name] if scope in (name, "all")]
        for group in groups:
            if self.ratio and not share_of(self.ratio, len(group)):
                raise ConfigError(
                    f"ratio: {self.ratio} prunes none of the {len(group)} channels of {group.name}; "
                    f"expected at least {smallest_share(len(group))}"
                )
        return groups


def rank_channels(groups: list[ChannelGroup], ranking: Ranking, *, run: Callable[[], object]) -> list[Tensor]:
    """Score the channels of each group; those with the lowest scores are pruned first.

    Args:
        groups: The groups of channels.
        ranking: See `FinePruning`.
        run: Function that passes the images through the model.

    Returns:
        (channels,) float64 for each group.
    """
    rectify = ranking == "post-relu"
    modules = [(group.norm if rectify else None) or group.tap or group.layer for group in groups]
    means = channel_means(modules, run, rectify=rectify)
    return [means[module][group.start : group.stop] for module, group in zip(modules, groups, strict=True)]
