"""Open a model for analysis: that of a finished run or any module, optionally with clean images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.inference import forward
from backdoorbench_moe.engine.opening.given_images import Images, PathLike, take_images, take_labels
from backdoorbench_moe.engine.opening.opened_run import check_patches, open_run
from backdoorbench_moe.engine.run import Run, check_finished, load_run
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import RoutedModel, undeclared_routing
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.paths import expand


@dataclass(frozen=True)
class OpenedModel:
    """A model and, if available, clean images.

    Attributes:
        name: Name of the run folder, or of the module's class.
        model: The model, on `device`, in evaluation mode. It is a copy and may be changed.
        images: (N, 3, S, S) uint8 on `device`, clean images; None if there are none.
        labels: (N,) int64 on `device`, the classes of the images; None if they are unknown.
        classes: Names of the classes, by number.
        image_size: Side S of the images that the model takes, in pixels.
        device: The device of the computations.
        precision: "fp32" or "bf16".
        run: The run; None for a module.
    """

    name: str
    model: nn.Module
    images: Tensor | None
    labels: Tensor | None
    classes: tuple[str, ...]
    image_size: int
    device: torch.device
    precision: str
    run: Run | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return len(self.classes)

    @property
    def split(self) -> Split | None:
        """The images with their labels; None if either is missing."""
        return None if self.images is None or self.labels is None else Split(self.images, self.labels)

    @property
    def routed(self) -> RoutedModel | None:
        """The model if it is routed; None if it is dense."""
        return self.model if isinstance(self.model, RoutedModel) else None


def open_model(
    source: Run | PathLike | nn.Module,
    *,
    images: Images | None = None,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    with_data: bool = True,
    data_root: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> OpenedModel:
    """Open a model for analysis.

    Args:
        source: A finished run, the path of its folder, or a module that maps images (B, 3, S, S) in [0, 1] to logits
            (B, classes). A module is copied and not changed.
        images: Clean images: (N, 3, S, S) uint8, or floats in [0, 1], which are rounded to 8 bits; a `Split`; or a
            folder of image files. For a run, the default is the test images on which its BA is measured.
        labels: (N,) classes of the images. They can be omitted for a `Split`, or for a folder whose subfolders have the
            names of a run's classes.
        num_classes: Number of classes of a module; None to find it by a forward pass.
        image_size: Side of the images that a module takes, required if there are no images. Files are resized to it, by
            default to the shorter side of the first one.
        with_data: Whether to read the test images of a run if `images` is None. If False, the result has no images.
        data_root: Folder of the run's data, if it has moved since the run.
        device: "auto", "cpu", "cuda" or "cuda:N"; None for that of the run, or "auto" for a module.
        precision: "auto", "fp32" or "bf16"; None for that of the run, or "fp32" for a module.

    Raises:
        BbmoeError: The run, the module or the images cannot be used.
    """
    if isinstance(source, nn.Module):
        given = None if images is None else take_images(images, size=image_size)
        size = image_size if given is None else given[0].shape[-1]
        opened = _open_module(source, size, device or "auto", precision or "fp32")
        count = _count_classes(opened) if num_classes is None else num_classes
        opened = replace(opened, classes=tuple(map(str, range(count))))
    else:
        opened = _open_run(source, images, data_root, device, precision, with_data=with_data)
        size, classes = opened.image_size, opened.classes
        given = None if images is None else take_images(images, size=size, classes=classes)
    if given is not None:
        opened = replace(opened, images=given[0].to(opened.device), labels=None)
        labels = given[1] if labels is None else labels
    if labels is None:
        return opened
    if opened.images is None:
        raise ConfigError("labels: expected none, as there are no images")
    found = take_labels(labels, len(opened.images), opened.num_classes)
    return replace(opened, labels=found.to(opened.device))


def _open_module(module: nn.Module, size: int | None, device: str, precision: str) -> OpenedModel:
    if size is None:
        raise ConfigError.expected("image_size", "the side of the module's images, as there are none", None)
    if fault := undeclared_routing(type(module)):
        raise ConfigError(f"model: {fault}")
    where = resolve_device(device)
    model = copy.deepcopy(module).to(where).to(memory_format=torch.channels_last).eval()
    name = type(module).__name__
    if isinstance(model, RoutedModel):
        check_patches(name, model, size)
    return OpenedModel(name, model, None, None, (), size, where, resolve_precision(precision, where))


def _open_run(
    source: Run | PathLike,
    images: Images | None,
    data_root: str | None,
    device: str | None,
    precision: str | None,
    *,
    with_data: bool,
) -> OpenedModel:
    run = source if isinstance(source, Run) else load_run(expand(source, "run"))
    check_finished(run)
    where = resolve_device(device or run.spec.device)
    chosen = resolve_precision(precision or run.spec.precision, where)
    facts, name = run.record.data, run.folder.path.name
    if "image_size" not in facts:
        raise ConfigError.expected("run", "a run on images", f"{name}, whose data are texts")
    size, classes = facts["image_size"], tuple(facts["classes"])
    if images is None and with_data:
        opened = open_run(run, data_root=data_root, device=device)
        test = opened.test
        return OpenedModel(name, opened.model, test.images, test.labels, classes, size, where, chosen, run)
    model = run.model().to(where).to(memory_format=torch.channels_last).eval()
    if isinstance(model, RoutedModel):
        check_patches(run.spec.model.name, model, size)
    return OpenedModel(name, model, None, None, classes, size, where, chosen, run)


@torch.inference_mode()
def _count_classes(opened: OpenedModel) -> int:
    """Number of classes, from the logits of one black image."""
    shape = (1, 3, opened.image_size, opened.image_size)
    blank = torch.zeros(shape, dtype=torch.uint8, device=opened.device)
    try:
        logits: Any = forward(opened.model, blank, precision=opened.precision)
    except Exception as error:  # The user's module may raise any exception.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model: {opened.name} does not take images {shape}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError.expected("model", "logits (B, classes)", got)
    return logits.shape[1]
