"""The subject of an audit: a model with the images and other inputs that are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import DefenseTask
from backdoorbench_moe.engine.inference import logits, predict, routings
from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.images import Split

# Takes a name and a function that computes arrays. Returns the arrays, computed now or earlier in the same audit.
Keep = Callable[[str, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]
# Largest number of images that are used. More images would slow down the checks with little benefit.
MOST_IMAGES = 500
FEWEST_IMAGES = 20


@dataclass(frozen=True)
class Subject:
    """A model under audit, in evaluation mode, and all given information about it. Created by `make_subject`.

    Attributes:
        model: The model, on `device`. Checks do not change it.
        images: Clean images, (N, 3, S, S) uint8 on `device`; None if not given.
        known_labels: Their classes, (N,) int64; None if not given.
        base: The state dict of the model that the experts were fine-tuned from; None if not given.
        tasks: Images of each task of a mixture, (n, 3, S, S) uint8 on `device`; empty if not given.
        task_names: Names of the tasks; empty if not known.
        given_size: Side of the images in pixels, for a model without images; None if not given.
        classes: Names of the classes, by number; empty if not known.
        device: The device of the computations.
        precision: "fp32" or "bf16".
        seed: The seed of all random draws.
        keep: Storage for arrays that several checks use.
    """

    model: nn.Module
    images: Tensor | None
    known_labels: Tensor | None
    base: Mapping[str, Tensor] | None
    tasks: Sequence[Tensor]
    task_names: Sequence[str]
    given_size: int | None
    classes: Sequence[str]
    device: torch.device
    precision: str
    seed: int
    keep: Keep = field(repr=False)

    @cached_property
    def num_classes(self) -> int:
        """Number of classes of the model. Requires images or their size."""
        side, images = self.image_size, self.images
        assert side is not None
        if images is None:
            images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        return logits(self.model, images[:2], precision=self.precision).shape[1]

    @cached_property
    def image_size(self) -> int | None:
        """Side of the images in pixels: that of the given images, the given size, or that covered by the patches."""
        if self.images is not None:
            return self.images.shape[-1]
        # A language model is routed, too, but has no patches.
        if (
            self.given_size is None
            and isinstance(self.model, RoutedModel)
            and hasattr(self.model, "patch_grid")
        ):
            rows, columns = self.model.patch_grid
            return rows * self.model.patch_size if rows == columns else None
        return self.given_size

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted classes of the images, (N,) int64."""
        assert self.images is not None
        return predict(self.model, self.images, precision=self.precision)

    @cached_property
    def split(self) -> Split:
        """The images with their known classes, or with the predicted classes without labels."""
        assert self.images is not None
        return Split(self.images, self.predicted if self.known_labels is None else self.known_labels)

    def class_name(self, label: int | str) -> str:
        """Format a class as "class 3", or "class 3 (stop)" if the classes have names."""
        number = int(label)
        named = number < len(self.classes) and self.classes[number] != str(number)
        return f"class {number} ({self.classes[number]})" if named else f"class {number}"

    def task_name(self, number: int) -> str:
        """Format a task as "0", or "0 (plain)" if the tasks have names."""
        return f"{number} ({self.task_names[number]})" if number < len(self.task_names) else str(number)

    @cached_property
    def accuracy(self) -> float | None:
        """Accuracy on the images, in percent; None without labels."""
        if self.known_labels is None:
            return None
        return 100 * (self.predicted == self.known_labels).double().mean().item()

    @cached_property
    def task(self) -> DefenseTask:
        """The task of a defender with these images, for the functions of defenses. It does not allow training."""
        assert self.images is not None
        return DefenseTask(
            model=self.model,
            num_classes=self.num_classes,
            image_size=self.images.shape[-1],
            train=TrainSpec(),
            device=self.device,
            precision=self.precision,
            seed=self.seed,
            tune=_refuse,
            logits=partial(logits, precision=self.precision),
            routing=partial(routings, precision=self.precision),
            fresh=_refuse,
            report=_refuse,
            granted={"clean": self.split},
        )


def _refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("an audit trains nothing")


def make_subject(
    model: nn.Module,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    base: Mapping[str, Tensor] | None = None,
    tasks: Sequence[Tensor] = (),
    task_names: Sequence[str] = (),
    image_size: int | None = None,
    classes: Sequence[str] = (),
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    seed: int = 0,
    keep: Keep | None = None,
) -> Subject:
    """Check a model and the inputs given with it, and create a subject.

    Args:
        model: Maps images (B, 3, S, S) in [0, 1] to logits (B, classes). It is moved to `device`, and put into
            evaluation mode.
        images: (N, 3, S, S) uint8, at least `FEWEST_IMAGES`. The first `MOST_IMAGES` are used.
        labels: (N,) int64.
        base: A state dict.
        tasks: (n, 3, S, S) uint8 for each task.
        task_names: Names of the tasks, for messages.
        image_size: Side of the images, for a model without images.
        classes: Names of the classes, by number, for messages.
        device: The device.
        precision: "fp32" or "bf16".
        seed: The seed.
        keep: Storage for arrays; None to keep them in memory.

    Raises:
        ConfigError: The model has weights that are NaN or infinite, or does not return logits; or the images, labels
            or tasks do not fit together.
        ShapeError: Images have the wrong shape or type, or the model cannot process them.
    """
    check_weights(model)
    for name, each in (("images", images), *((f"tasks[{n}]", task) for n, task in enumerate(tasks))):
        if each is not None:
            check_images(name, each)
    if labels is not None:
        _check_labels(labels, images)
    if images is not None and len(images) < FEWEST_IMAGES:
        raise ConfigError.expected("images", f"at least {FEWEST_IMAGES} images, or none", len(images))
    model = model.to(device).eval()
    if images is not None:
        _check_output(model, images[:2].to(device), precision, labels)
    elif image_size is not None:
        blank = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=device)
        _check_output(model, blank, precision, None)
    return Subject(
        model=model,
        images=None if images is None else images[:MOST_IMAGES].to(device),
        known_labels=None if labels is None else labels[:MOST_IMAGES].to(device),
        base=base,
        tasks=[task[:MOST_IMAGES].to(device) for task in tasks],
        task_names=tuple(task_names),
        given_size=image_size,
        classes=tuple(classes),
        device=torch.device(device),
        precision=precision,
        seed=seed,
        keep=keep or in_memory(),
    )


def in_memory() -> Keep:
    """Return a `Keep` that keeps arrays in memory."""
    found: dict[str, Mapping[str, Tensor]] = {}

    def keep(name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if name not in found:
            found[name] = make()
        return found[name]

    return keep


def check_weights(model: nn.Module) -> None:
    """Raise ConfigError if a weight is NaN or infinite, or if there are no weights."""
    empty = True
    for name, tensor in _floats(model):
        empty = False
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"model: {name} has weights that are NaN or infinite")
    if empty:
        raise ConfigError(f"model: {type(model).__name__} has no weights")


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield name, tensor


def check_images(name: str, images: Any) -> None:
    """Raise ShapeError unless images are (N, 3, S, S) uint8, at least one."""
    fits = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and len(images)
    if not fits or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"{name}: expected square uint8 images (N, 3, S, S), got {got}")


def _check_labels(labels: Any, images: Tensor | None) -> None:
    if images is None:
        raise ConfigError("labels: expected images with the labels, got none")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ConfigError(f"labels: expected one int64 label for each of {len(images)} images, got {got}")


def _check_output(model: nn.Module, images: Tensor, precision: str, labels: Tensor | None) -> None:
    side, kind = images.shape[-1], type(model).__name__
    try:
        found = logits(model, images, precision=precision)
    except Exception as error:  # A model of unknown origin may raise any error.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ShapeError(f"model: {kind} cannot process images of {side}x{side} ({reason})") from error
    if found.ndim != 2 or found.shape[1] < 2:
        raise ConfigError(
            f"model: expected logits (images, classes) for at least two classes, got {tuple(found.shape)}"
        )
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < found.shape[1]:
        raise ConfigError(
            f"labels: expected classes in 0..{found.shape[1] - 1}, which the model distinguishes, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
