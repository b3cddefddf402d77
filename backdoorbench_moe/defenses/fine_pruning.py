"""Fine-pruning: set the channels that clean images use least to zero, then tune on clean images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.parts import check_tuning, structure
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.pruning import channel_means, lowest, silence, silenced
from backdoorbench_moe.moe.structure import ChannelGroup
from backdoorbench_moe.shares import share_of, smallest_share

Ranking = Literal["post-relu", "notebook"]


class FinePruning(Defense):
    """Prune a share of the last convolution's channels (of every expert), then fine-tune on clean images.

    Of a transformer, which has none: of the hidden units of its last MLP, of each expert in the last layer of experts.

    ratio: share of each group's own channels, in [0, 1); floor(ratio * channels) are pruned. scope: "experts",
    each expert's last convolution; "trunk", the last one before them, or of a dense model; "all", both; None is
    "experts" where there are any, else "trunk". epochs: of tuning; 0 only prunes. lr: the run's own where
    None, as all else of its recipe is. clean_fraction: share of the training images the defender holds; the
    paper's 1.0. finetune_data: see `Defense`.

    ranking: which channels go, measured on the images the defender holds.
    - "post-relu": those with the least mean activation behind norm and ReLU; the channel of the norm is
      set to zero with that of the convolution, so that the activation itself is zero (Liu et al., RAID 2018).
      Where no norm has the convolution's channels, of the convolution's own output behind a ReLU. In a transformer
      the channels are the hidden units of an MLP, so measured where they go into its activation.
    - "notebook": those with the least signed mean of the convolution's output, before the norm; only
      the convolution's channel is set to zero, which the norm makes a constant (BadPatches' notebook).

    Departure: the original ranks on held-out images. The defender's are drawn from the training set, and so
    have been seen by the victim; the attacker's changes to them are undone unless finetune_data is
    "notebook". Pruned channels stay zero through the tuning. Raises ConfigError for values out of range,
    and for a scope the model does not have. Source: BadPatches §5 and its notebooks.
    """

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
        if not 0 <= ratio < 1:
            raise ConfigError.expected("ratio", "a number in [0, 1)", ratio)
        check_tuning(epochs, lr, at_least=0)
        self.ratio, self.ranking, self.scope, self.epochs, self.lr = ratio, ranking, scope, epochs, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model has no such channels, or too few for the ratio to be one."""
        self._groups(model)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Rank, prune, tune."""
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
        with silenced(pruned):
            task.tune(task.model, task.clean, epochs=self.epochs, lr=self.lr)
        return DefenseResult("tuned", task.model)

    def _groups(self, model: nn.Module) -> list[ChannelGroup]:
        there = structure(model).prunable()
        if not there:
            raise ConfigError(f"scope: {type(model).__name__} names no channels that could be pruned")
        scope = self.scope or ("experts" if "experts" in there else "trunk")
        if scope != "all" and scope not in there:
            raise ConfigError.expected("scope", f"one of {[*there, 'all']} for {type(model).__name__}", scope)
        groups = [group for name in there for group in there[name] if scope in (name, "all")]
        for group in groups:
            if self.ratio and not share_of(self.ratio, len(group)):
                raise ConfigError(
                    f"ratio: {self.ratio} of the {len(group)} channels of {group.name} is no channel; "
                    f"expected at least {smallest_share(len(group))}"
                )
        return groups


def rank_channels(groups: list[ChannelGroup], ranking: Ranking, *, run: Callable[[], object]) -> list[Tensor]:
    """Score each group's channels, (channels,) float64 a group; the least are the first to go.

    run: passes the images through the model.
    """
    rectify = ranking == "post-relu"
    modules = [(group.norm if rectify else None) or group.tap or group.layer for group in groups]
    means = channel_means(modules, run, rectify=rectify)
    return [means[module][group.start : group.stop] for module, group in zip(modules, groups, strict=True)]
