"""The defense interface, and all that a defense is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final

from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.shares import share_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from backdoorbench_moe.config import TrainSpec
    from backdoorbench_moe.moe.routed import Routing
    from backdoorbench_moe.ops.images import Split

# What a defense may declare that it needs, see `Defense.needs`.
NEEDS = ("clean", "training-set", "features", "losses")


class Tune(Protocol):
    """Trains a model further, in place, with its run's recipe; the same call gives the same weights."""

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
        """Train `model` on `split`.

        Args:
            model: The model; it is left in evaluation mode.
            split: The images.
            epochs: Passes over the images; 0 does nothing.
            lr: Peak learning rate; the recipe's if None.
            modules: Train only these; all other modules keep their weights and running statistics. All if None.
            rows: Instead of `modules`: names in the model's state dict to the rows (dim 0), `start` to `stop`, that
                may change. Every other value, of parameters and buffers, stays as it is, bit for bit. Norms that own
                some of these rows see the statistics of their batch in all of their channels.

        Raises:
            ValueError: A name in `rows` is not in the state dict.
        """


@dataclass(frozen=True)
class DefenseTask:
    """All that a defense knows. Nothing here leads to the attacker: no trigger, no indices, no test images.

    Args:
        model: The defense's own copy, in evaluation mode, on `device`; it may be changed in place.
        num_classes: Number of classes.
        train: The recipe that the model was trained with.
        device: The device of model and images.
        precision: "fp32" or "bf16".
        seed: For every draw that the defense makes.
        tune: See `Tune`.
        logits: (model, (N, 3, H, W) uint8) to (N, classes) float32, in evaluation mode.
        routing: (model, (N, 3, H, W) uint8) to the `Routing` of every routed layer, a list for each batch of
            images, in their order; for a `moe.routed.RoutedModel`.
        fresh: Gives a newly drawn, untrained model of the same architecture, the same at every call, in evaluation
            mode, on `device`. It is drawn from the defense's seed, not from the attacker's.
        report: Call it with a name, such as "pruned", and the model at the end of every stage but the last. A copy
            is kept and measured after the defense has returned, so that no measurement can guide it.
        granted: What the defense declared in `needs`, by name; read it through the properties.
    """

    model: nn.Module
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
    granted: Mapping[str, Any]

    @property
    def clean(self) -> Split:
        """The images that the defender holds, uint8 on `device`, with their true labels. Needs "clean"."""
        return self._grant("clean")

    @property
    def training_set(self) -> Split:
        """The whole training set as the victim had it, poisoned images and labels included. Needs "training-set"."""
        return self._grant("training-set")

    @property
    def features(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """(model, (N, 3, H, W) uint8) to (N, D) float32, what goes into the head. Needs "features"."""
        return self._grant("features")

    @property
    def losses(self) -> Callable[[nn.Module, Split], Tensor]:
        """(model, split of N images) to (N,) float32, the cross-entropy of each image. Needs "losses"."""
        return self._grant("losses")

    def _grant(self, need: str) -> Any:
        if need not in self.granted:
            raise PluginError(f"defense: uses {need!r}, which it does not declare in `needs`")
        return self.granted[need]


@dataclass(frozen=True)
class DefenseResult:
    """What a defense gives back.

    Args:
        stage: Name of its last stage, such as "tuned".
        model: The defended model; its weights have the same names and shapes as before.
        judgements: What it found; at most one about inputs. With one, `stage` is that of the filtered model.
    """

    stage: str
    model: nn.Module
    judgements: tuple[Judgement, ...] = ()

    @property
    def filter(self) -> Judgement | None:
        """The judgement about inputs; None if there is none."""
        return next((each for each in self.judgements if each.about == "input"), None)


class Defense(ABC):
    """Something done to a model by a defender who does not know whether and how it was attacked.

    Subclasses write `defend`, and `check` if not every model will do; users call the object.

    Attributes:
        needs: What the defender must have, of `NEEDS`: "clean" images with true labels, the "training-set" as the
            victim had it, "features" before the head, the "losses" of single images. Nothing else is given.
        tiny: Options that the conformance tests build the defense with: those that keep it short, or have no default.
        deviations: Conformance tests that the defense is known to fail, and why: reasons by name of the test.

    Args:
        clean_fraction: Share of the training images that the defender holds, in (0, 1]; drawn from the task's seed.
        finetune_data: "clean": as they were before the attack. "notebook": the poisoned ones among them are stamped
            but truly labelled, as in the BadPatches notebook.

    Raises:
        ConfigError: `clean_fraction` is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"clean"})
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, clean_fraction: float = 0.05, finetune_data: Literal["clean", "notebook"] = "clean"
    ) -> None:
        if not 0 < clean_fraction <= 1:
            raise ConfigError.expected("clean_fraction", "a number in (0, 1]", clean_fraction)
        self.clean_fraction, self.finetune_data = clean_fraction, finetune_data

    def count(self, images: int, num_classes: int) -> int:
        """How many of `images` training images the defender holds; 0 if the defense does not need any.

        Raises:
            ConfigError: There are fewer than classes.
        """
        if "clean" not in self.needs:
            return 0
        count = share_of(self.clean_fraction, images)
        if count < num_classes:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; "
                f"expected at least {num_classes}, as many as there are classes"
            )
        return count

    @final
    def __call__(self, task: DefenseTask) -> DefenseResult:
        """Defend the task's model.

        Raises:
            ConfigError: The defense cannot be applied to this model.
            PluginError: The defense returned something else than a valid result.
        """
        self.check(task.model)
        result = self.defend(task)
        if not isinstance(result, DefenseResult):
            raise PluginError(f"defense {type(self).__name__}: expected a DefenseResult, got {result!r}")
        filters = [each for each in result.judgements if each.about == "input"]
        if len(filters) > 1:
            raise PluginError(
                f"defense {type(self).__name__}: expected one judgement about inputs, got {filters}"
            )
        return result

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Raise ConfigError, naming the option, if the defense cannot be applied to this model; change nothing.

        The model need not be trained yet.
        """

    @abstractmethod
    def defend(self, task: DefenseTask) -> DefenseResult:
        """Do it; `check` has passed."""
