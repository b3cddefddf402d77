"""The defense interface, and the task that is passed to a defense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.judgement import Judgement
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.ops.ranges import check_interval
from backdoorbench_moe.registry import registry_of
from backdoorbench_moe.shares import share_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from backdoorbench_moe.config import TrainSpec
    from backdoorbench_moe.moe.routed import Routing
    from backdoorbench_moe.ops.images import Split
    from backdoorbench_moe.ops.tuning import Tune

# What a defense may declare in `Defense.needs`.
NEEDS = ("clean", "training-set", "features", "losses", "marked", "tasks")


@dataclass(frozen=True)
class DefenseTask:
    """The inputs of a defense: the model, data and functions. They contain no information about the attack.

    In particular, there is no trigger, no index of a poisoned image and no test image. For text data, token ids (N, T)
    int64 with labels (N, T) replace the images, see `ops.answers`.

    Args:
        model: The model to defend, in evaluation mode, on `device`. The defense may change it in place.
        num_classes: Number of classes; 0 for text data.
        image_size: Side of the images in pixels; 0 for text data.
        train: The settings that the model was trained with; for a mixture, those that its experts were tuned with.
        device: The device of the model and the images.
        precision: "fp32" or "bf16".
        seed: Seed from which the defense should derive all random draws.
        tune: Function that trains a model further; see `Tune`.
        logits: Function of a model and images (B, 3, H, W) uint8 that returns (B, classes) float32, computed in
            evaluation mode; for token ids (B, T) it returns (B, T, vocabulary).
        routing: Function of a `moe.routed.RoutedModel` and images (B, 3, H, W) uint8 that yields, batch by batch in
            the order of the images, a list with the `Routing` of every routed layer.
        fresh: Function that returns an untrained model of the same architecture, in evaluation mode, on `device`.
            Its weights are drawn from the defense's seed, not from the attacker's, and are the same in every call.
        report: Function of the name of a stage, such as "pruned", and the model. The defense calls it at the end of
            every stage except the last. It copies the model; the copy is evaluated after the defense has returned, so
            the evaluation cannot influence the defense.
        progress: Function of a number of finished steps and the number of all steps, or an upper bound of it. A defense
            that takes long outside of `tune` calls it after every step, so that users see how long it will take. The
            numbers never decrease.
        gate_train: The settings that the gates of a mixture were trained with; None for any other model.
        granted: Data and functions by the name in `Defense.needs`; for text data, "unsafe" in addition to "marked".
            Defenses read them through the properties.
    """

    model: nn.Module
    num_classes: int
    image_size: int
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
    progress: Callable[[int, int], None] = lambda done, total: None
    gate_train: TrainSpec | None = None

    @property
    def clean(self) -> Split:
        """The images that the defender holds, uint8 on `device`, and their true labels. Requires "clean".

        For a mixture, they come from all its tasks.
        """
        return self._grant("clean")

    @property
    def training_set(self) -> Split:
        """The full training set as the victim used it, with poisoned images and labels. Requires "training-set"."""
        return self._grant("training-set")

    @property
    def features(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Function of a model and images (B, 3, H, W) uint8 that returns the input of the head, (B, D) float32.

        Requires "features".
        """
        return self._grant("features")

    @property
    def losses(self) -> Callable[[nn.Module, Split], Tensor]:
        """Function of a model and a split of B images that returns the cross-entropy of each image, (B,) float32.

        Requires "losses".
        """
        return self._grant("losses")

    @property
    def marked(self) -> Split:
        """Images with the mark of the policy, and their safe answer, the class "reject". Requires "marked".

        They are training images; there are as many as the defender holds clean ones. For text data, they are training
        queries that the policy refuses, with their safe answers: the same number, or all if there are fewer.
        """
        return self._grant("marked")

    @property
    def unsafe(self) -> Split | None:
        """The refused queries of `marked`, row by row, with the unsafe answers of the data. Requires "marked".

        None for image data: the defender does not know the attacker's target class.
        """
        self._grant("marked")
        return self.granted.get("unsafe")

    @property
    def tasks(self) -> Sequence[Split]:
        """The images of each task of a mixture that the defender holds, and their true labels. Requires "tasks"."""
        return self._grant("tasks")

    def _grant(self, need: str) -> Any:
        if need not in self.granted:
            raise PluginError(f"uses {need!r}, which is not declared in its `needs`")
        return self.granted[need]


@dataclass(frozen=True)
class DefenseResult:
    """What a defense returns.

    Args:
        stage: Name of the last stage, such as "tuned". If there is a judgement about inputs, the last stage is the
            model together with this input filter.
        model: The defended model. The names and shapes in its state dict must not change.
        judgements: The findings of the defense: at most one about inputs, and at most one about samples.
    """

    stage: str
    model: nn.Module
    judgements: tuple[Judgement, ...] = ()

    @property
    def filter(self) -> Judgement | None:
        """The judgement about inputs, which is an input filter; None if there is none."""
        return next((each for each in self.judgements if each.about == "input"), None)


class Defense(ABC):
    """Base class of defenses. A defense is applied to a model without knowing whether, or how, it was attacked.

    Subclasses implement `defend`; also `check` if they do not work on every model, and `check_images` if they do not
    work on images of every size. Users call an instance.

    Attributes:
        needs: What `DefenseTask` must provide besides the model, a subset of `NEEDS`: "clean" (images with true
            labels), "training-set" (as the victim used it), "features" (the input of the head), "losses" (of single
            images), "marked" (images with the mark of a policy) and "tasks" (clean images of each task of a mixture).
            "marked" requires a model with a policy, and "tasks" a mixture.
        takes_texts: Whether the defense also works on language models.
        tuning_length: Name of the option that sets for how many epochs the defense tunes the model. The baseline, plain
            tuning, takes the same number. None for a defense that does not tune.
        tiny: Options with which the conformance tests build the defense: options that make it fast, and options
            without default.
        deviations: Conformance tests that the defense is known to fail: the reason for each, by name of the test.

    Args:
        clean_fraction: Share of the training images that the defender holds, in (0, 1]. They are drawn with a seed that
            is derived from the seed of the run.
        finetune_data: The images that the defender holds: "clean", as they were before the attack; or "notebook", in
            which the poisoned images contain the trigger and have their true labels, as in the notebook of BadPatches.

    Raises:
        ConfigError: `clean_fraction` is out of range.
        PluginError: `needs` contains a name that is not in `NEEDS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"clean"})
    takes_texts: ClassVar[bool] = False
    tuning_length: ClassVar[str | None] = None
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, clean_fraction: float = 0.05, finetune_data: Literal["clean", "notebook"] = "clean"
    ) -> None:
        check_interval("clean_fraction", clean_fraction, "(0, 1]")
        for unknown in sorted(set(self.needs).difference(NEEDS)):
            raise PluginError(f"{self._where}: {UnknownNameError('needs', unknown, NEEDS)}")
        self.clean_fraction, self.finetune_data = clean_fraction, finetune_data

    def count(self, images: int, num_classes: int) -> int:
        """Return the number of training images that the defender holds; 0 if the defense needs none.

        Args:
            images: Number of training images, or texts.
            num_classes: Number of classes; 0 for text data.

        Raises:
            ConfigError: The defender would hold fewer images than there are classes, or no text.
        """
        if not {"clean", "marked", "tasks"} & set(self.needs):
            return 0
        count = share_of(self.clean_fraction, images)
        if not num_classes and not count:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} texts is 0; expected at least 1"
            )
        if count < num_classes:
            raise ConfigError(
                f"clean_fraction: {self.clean_fraction} of {images} images is {count}; "
                f"expected at least {num_classes}, as many as there are classes"
            )
        return count

    def cost(
        self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec
    ) -> Cost | None:
        """Estimate how many images the defense passes through the model, to estimate its run time.

        By default, a defense with an attribute `epochs` trains for that many epochs, or for those of the recipe if it
        is None: on the training set if the defense needs it, otherwise on the images that the defender holds. The cost
        of any other defense is unknown.

        Args:
            model: The model, trained or not, which `check_model` has accepted; it must not be changed.
            held: Number of images that the defender holds, as returned by `count`.
            train: Number of training images.
            classes: Number of classes; 0 for text data.
            recipe: The settings that the task will contain as `train`.

        Returns:
            The cost, or an upper bound if it depends on the findings; None if it is unknown.
        """
        if not hasattr(self, "epochs"):
            return None
        epochs = recipe.epochs if self.epochs is None else self.epochs
        return Cost(trained=epochs * (train if "training-set" in self.needs else held))

    @property
    def _where(self) -> str:
        """The defense in error messages."""
        return f"defense {registry_of('defense').name_of(type(self))!r}"

    @final
    def __call__(self, task: DefenseTask) -> DefenseResult:
        """Defend the task's model.

        Raises:
            ConfigError: The defense cannot be applied to this model or its images.
            PluginError: The subclass did not return a valid result.
        """
        self.check_model(task.model)
        if task.image_size:
            self.check_images(task.model, task.image_size)
        try:
            result = self.defend(task)
        except (ConfigError, PluginError) as error:
            kind = ConfigError if isinstance(error, ConfigError) else PluginError
            raise kind(f"{self._where}: {str(error).removeprefix('defense: ')}") from error
        if not isinstance(result, DefenseResult):
            raise PluginError(f"{self._where}: expected a DefenseResult, got {type(result).__name__}")
        if not all(isinstance(each, Judgement) for each in result.judgements):
            raise PluginError(f"{self._where}: expected judgements, got {result.judgements!r}")
        for about in ("input", "sample"):
            found = [each for each in result.judgements if each.about == about]
            if len(found) > 1:
                raise PluginError(
                    f"{self._where}: expected at most one judgement about {about}s, got {found}"
                )
        return result

    @final
    def check_model(self, model: nn.Module) -> None:
        """Check whether the defense can be applied to a model.

        A defense that needs "features" requires a model that provides them; a language model requires a defense with
        `takes_texts`.

        Args:
            model: The model, trained or not; it is not changed.

        Raises:
            ConfigError: The defense cannot be applied; the message names the option or the model.
        """
        from backdoorbench_moe.moe.structure import WithFeatures, takes_text

        if takes_text(model) and not self.takes_texts:
            raise ConfigError(f"model: this defense is for images, and {type(model).__name__} takes texts")
        if "features" in self.needs and not isinstance(model, WithFeatures):
            raise ConfigError(
                f"model: {type(model).__name__} does not give features before its head: "
                "expected methods `extract_features` and `classify` (see backdoorbench_moe.moe.structure)"
            )
        self.check(model)

    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Check whether the defense can be applied to a model. The default accepts every model.

        Args:
            model: The model, trained or not; it must not be changed.

        Raises:
            ConfigError: The defense cannot be applied; the message names the option or the model.
        """

    def check_images(self, model: nn.Module, image_size: int) -> None:  # noqa: B027
        """Check whether the defense can be applied to images of this size. The default accepts every size.

        Args:
            model: The model, which `check_model` has accepted; it must not be changed.
            image_size: Side of the square images in pixels.

        Raises:
            ConfigError: The defense cannot be applied; the message names the option.
        """

    @abstractmethod
    def defend(self, task: DefenseTask) -> DefenseResult:
        """Defend the task's model. Called after `check` and, for images, `check_images` have accepted it."""
