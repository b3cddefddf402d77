"""The defense interface, and everything that a defense is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final

from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.shares import share_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from backdoorbench_moe.config import TrainSpec
    from backdoorbench_moe.moe.routed import Routing
    from backdoorbench_moe.ops.images import Split

# What a defense may declare in `Defense.needs`.
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
            modules: Train only these modules; all others keep their weights and running statistics. If None, all
                modules are trained.
            rows: Train only these rows (of dimension 0), as (start, stop) by name in the model's state dict; given
                instead of `modules`. All other values of parameters and buffers stay the same, bit for bit. Norms
                that own some of the rows normalise all of their channels with the statistics of the batch.

        Raises:
            ValueError: A name in `rows` is not in the state dict.
        """


@dataclass(frozen=True)
class DefenseTask:
    """Everything that a defense knows. It holds no trigger, no indices of poisoned images and no test images.

    Args:
        model: The defense's own copy, in evaluation mode, on `device`; it may be changed in place.
        num_classes: Number of classes.
        train: The recipe that the model was trained with.
        device: The device of model and images.
        precision: "fp32" or "bf16".
        seed: Seed of every random draw of the defense.
        tune: See `Tune`.
        logits: Function of a model and images (B, 3, H, W) uint8 that returns (B, classes) float32, computed in
            evaluation mode.
        routing: Function of a `moe.routed.RoutedModel` and images (B, 3, H, W) uint8 that yields, batch by batch in
            the order of the images, the list of the `Routing` of every routed layer.
        fresh: Function that returns an untrained model of the same architecture, in evaluation mode, on `device`.
            Its weights are drawn from the defense's seed, not from the attacker's, and are the same at every call.
        report: Function of a name, such as "pruned", and the model, to be called at the end of every stage except
            the last. It keeps a copy, which is measured after the defense has returned, so that no measurement can
            influence the defense.
        granted: What the defense declared in `needs`, by name. Defenses read it through the properties.
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
        """The images that the defender holds, uint8 on `device`, and their true labels. Needs "clean"."""
        return self._grant("clean")

    @property
    def training_set(self) -> Split:
        """The whole training set as the victim had it, poisoned images and labels included. Needs "training-set"."""
        return self._grant("training-set")

    @property
    def features(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Function of a model and images (B, 3, H, W) uint8 that returns the head's input, (B, D) float32.

        Needs "features".
        """
        return self._grant("features")

    @property
    def losses(self) -> Callable[[nn.Module, Split], Tensor]:
        """Function of a model and a split of B images that returns the cross-entropy of each, (B,) float32.

        Needs "losses".
        """
        return self._grant("losses")

    def _grant(self, need: str) -> Any:
        if need not in self.granted:
            raise PluginError(f"defense: uses {need!r}, which it does not declare in `needs`")
        return self.granted[need]


@dataclass(frozen=True)
class DefenseResult:
    """What a defense returns.

    Args:
        stage: Name of the last stage, such as "tuned". If there is a judgement about inputs, this is the stage of the
            model together with its input filter.
        model: The defended model; its weights have the same names and shapes as before.
        judgements: The findings of the defense, of which at most one is about inputs.
    """

    stage: str
    model: nn.Module
    judgements: tuple[Judgement, ...] = ()

    @property
    def filter(self) -> Judgement | None:
        """The judgement about inputs, or None."""
        return next((each for each in self.judgements if each.about == "input"), None)


class Defense(ABC):
    """What a defender does to a model without knowing whether and how it was attacked.

    Subclasses implement `defend`, and `check` if they do not work on every model. Users call the object.

    Attributes:
        needs: What the defense is given, a subset of `NEEDS`: "clean" images with true labels, the "training-set"
            as the victim had it, "features" before the head, and the "losses" of single images.
        tiny: Options that the conformance tests build the defense with: those that make it short, and those that
            have no default.
        deviations: Conformance tests that the defense is known to fail, and why: reasons by name of the test.

    Args:
        clean_fraction: Share of the training images that the defender holds, in (0, 1]. Which images is drawn from
            the task's seed.
        finetune_data: The defender's images: "clean", as they were before the attack, or "notebook", in which the
            poisoned ones are stamped but have their true labels, as in the BadPatches notebook.

    Raises:
        ConfigError: `clean_fraction` is out of range.
        PluginError: `needs` has a name that is not in `NEEDS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"clean"})
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, clean_fraction: float = 0.05, finetune_data: Literal["clean", "notebook"] = "clean"
    ) -> None:
        if not 0 < clean_fraction <= 1:
            raise ConfigError.expected("clean_fraction", "a number in (0, 1]", clean_fraction)
        for unknown in sorted(set(self.needs).difference(NEEDS)):
            raise PluginError(f"defense {type(self).__name__}: {UnknownNameError('needs', unknown, NEEDS)}")
        self.clean_fraction, self.finetune_data = clean_fraction, finetune_data

    def count(self, images: int, num_classes: int) -> int:
        """Return the number of training images that the defender holds; 0 if the defense does not need "clean".

        Args:
            images: Number of training images.
            num_classes: Number of classes.

        Raises:
            ConfigError: There are fewer images than classes.
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
            PluginError: The defense did not return a valid result.
        """
        self.check_model(task.model)
        result = self.defend(task)
        if not isinstance(result, DefenseResult):
            raise PluginError(f"defense {type(self).__name__}: expected a DefenseResult, got {result!r}")
        if not all(isinstance(each, Judgement) for each in result.judgements):
            raise PluginError(
                f"defense {type(self).__name__}: expected judgements, got {result.judgements!r}"
            )
        filters = [each for each in result.judgements if each.about == "input"]
        if len(filters) > 1:
            raise PluginError(
                f"defense {type(self).__name__}: expected one judgement about inputs, got {filters}"
            )
        return result

    @final
    def check_model(self, model: nn.Module) -> None:
        """Check whether the defense can be applied to a model, and whether the model gives what `needs` declares.

        Args:
            model: The model, trained or not; it is not changed.

        Raises:
            ConfigError: The defense cannot be applied; the message names the option or the model.
        """
        from backdoorbench_moe.moe.structure import WithFeatures

        if "features" in self.needs and not isinstance(model, WithFeatures):
            raise ConfigError(
                f"model: {type(model).__name__} does not give features before its head: "
                "expected methods `extract_features` and `classify` (see backdoorbench_moe.moe.structure)"
            )
        self.check(model)

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Check whether the defense can be applied to a model. By default it can be applied to any.

        Args:
            model: The model, trained or not; it must not be changed.

        Raises:
            ConfigError: The defense cannot be applied; the message names the option or the model.
        """

    @abstractmethod
    def defend(self, task: DefenseTask) -> DefenseResult:
        """Defend the task's model; `check` has passed."""
