"""The defense interface, and all that a defense is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final

from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.shares import share_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from backdoorbench_moe.config import TrainSpec
    from backdoorbench_moe.data.base import Split
    from backdoorbench_moe.moe.routed import Routing


class Tune(Protocol):
    """Trains a model further, in place, as its run's recipe has it; the same call gives the same weights.

    modules: only these are trained, all others rest, their norms' statistics too; all where None. rows: in
    place of `modules`, names in the model's state dict to the rows (dim 0), `start` to `stop`, that may change;
    every other value, of parameters and buffers, stays what it is, bit for bit. The norms that own some of
    these rows see their batch's statistics while they train, in all of their channels. epochs: 0 does nothing.
    lr: the recipe's where None. Raises ValueError for a name that the state dict does not have.
    """

    def __call__(
        self,
        model: nn.Module,
        split: Split,
        *,
        epochs: int,
        lr: float | None = None,
        modules: Sequence[nn.Module] | None = None,
        rows: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Train `model` on `split`."""


@dataclass(frozen=True)
class DefenseTask:
    """All that a defense knows. Nothing here leads to the attacker: no trigger, no indices, no test images.

    model: the defense's own copy, in evaluation mode, on `device`; it may be changed in place. clean: the
    images the defender holds, uint8 on `device`, with their true labels. train: the recipe the model was
    trained with. seed: for every draw the defense makes. tune: see `Tune`. logits: (model, (N, 3, H, W)
    uint8) to (N, classes) float32, in evaluation mode. routing: (model, (N, 3, H, W) uint8) to the `Routing` of
    every routed layer, a list for each batch of images, in their order; for models that are `moe.routed.RoutedModel`.
    fresh: a newly drawn, untrained model of the same make, the same at every call, drawn from the
    defense's seed and not from the attacker's; in evaluation mode, on `device`. report: call it with a name,
    such as "pruned", and the model when a stage other than the last is finished; a copy is kept and measured
    after the defense has returned, so no measurement can lead it.
    """

    model: nn.Module
    clean: Split
    num_classes: int
    train: TrainSpec
    device: torch.device
    precision: str
    seed: int
    tune: Tune
    logits: Callable[[nn.Module, Tensor], Tensor]
    routing: Callable[[nn.Module, Tensor], Iterator[list[Routing]]]
    fresh: Callable[[], nn.Module]
    report: Callable[[str, nn.Module], None]


@dataclass(frozen=True)
class DefenseResult:
    """What a defense gives back.

    stage: the name of its last stage, such as "tuned". model: the defended model, of the same architecture
    (the weights have the same names and shapes). scores and verdict: what a defense that judges found, plain
    values by what it judges: "sample", "class", "expert" or "model"; they go into the record as they are.

    filter: of a defense that judges inputs, (N, 3, H, W) uint8 images to (N,) finite floats, higher is
    more suspicious; an image's score does not depend on the others beside it. threshold: a score above it is
    suspicious, and such an image is rejected. The engine measures both after the defense has returned, on clean
    and triggered test images in one shuffled row; with a filter, `stage` is that of the filtered model.
    """

    stage: str
    model: nn.Module
    scores: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    filter: Callable[[Tensor], Tensor] | None = None
    threshold: float | None = None


class Defense(ABC):
    """Something done to a model with some clean images and no knowledge of the attack.

    clean_fraction: share of the training images, in (0, 1], the defender holds; drawn from the task's seed.
    finetune_data: "clean", as they were before the attack; or "notebook", with the poisoned ones among them
    still stamped but truly labelled, as the BadPatches notebook tunes on. Subclasses write `defend`, and
    `check` where not every model will do; users call the object.

    tiny: options that the conformance tests make it with: those that keep it short, or have no default.
    """

    tiny: ClassVar[Mapping[str, object]] = {}

    def __init__(
        self, *, clean_fraction: float = 0.05, finetune_data: Literal["clean", "notebook"] = "clean"
    ) -> None:
        if not 0 < clean_fraction <= 1:
            raise ConfigError.expected("clean_fraction", "a number in (0, 1]", clean_fraction)
        self.clean_fraction, self.finetune_data = clean_fraction, finetune_data

    def count(self, images: int, num_classes: int) -> int:
        """How many of `images` training images the defender holds. Raises ConfigError for too few."""
        count = share_of(self.clean_fraction, images)
        if count < num_classes:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; "
                f"expected at least {num_classes}, as many as there are classes"
            )
        return count

    @final
    def __call__(self, task: DefenseTask) -> DefenseResult:
        """Defend the task's model. Raises ConfigError if the model cannot take it, PluginError for no result."""
        self.check(task.model)
        result = self.defend(task)
        if not isinstance(result, DefenseResult):
            raise PluginError(f"defense {type(self).__name__}: expected a DefenseResult, got {result!r}")
        if (result.filter is None) != (result.threshold is None) or not isfinite(result.threshold or 0):
            raise PluginError(
                f"defense {type(self).__name__}: expected a filter with a finite threshold, or neither, "
                f"got {result.filter!r} and {result.threshold!r}"
            )
        return result

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Raise ConfigError, naming the option, if this model cannot take the defense; change nothing.

        The model need not be trained yet.
        """

    @abstractmethod
    def defend(self, task: DefenseTask) -> DefenseResult:
        """Do it; `check` has passed."""
