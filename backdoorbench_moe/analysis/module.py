"""The analysis of a model that is not a run, from clean images only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_moe.analysis import passes, pixels, routing
from backdoorbench_moe.engine.inference import predict
from backdoorbench_moe.engine.opening.opened_model import OpenedModel
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.experts import muted
from backdoorbench_moe.moe.structure import WithExperts
from backdoorbench_moe.ops.metrics import Proportion, proportion_of
from backdoorbench_moe.ops.routing import patch_sums
from backdoorbench_moe.ops.seeding import seeded


@dataclass(frozen=True)
class ModuleAnalysis:
    """The analysis of a model on clean images.

    Attributes:
        name: Name of the module's class, or of the run folder.
        images: Number of images.
        classes: Names of the classes, by number.
        predicted: (classes,) int64, number of images that are predicted as each class.
        ba: Accuracy on the images; None without labels.
        class_ba: Accuracy on the images of each class, by class number; classes without images are left out.
        routing: Routing of each routed layer; empty for a dense model.
        pixels: Brightness of the patches that each expert takes, for each routed layer; empty for a dense model.
        muted: BA with each expert muted, by name of the expert; None without labels, or if the model does not
            implement `experts()`.
    """

    name: str
    images: int
    classes: tuple[str, ...]
    predicted: Tensor
    ba: Proportion | None
    class_ba: dict[int, Proportion]
    routing: tuple[routing.LayerRouting, ...] = ()
    pixels: tuple[pixels.LayerPixels, ...] = ()
    muted: dict[str, Proportion] | None = None


def analyze_module(opened: OpenedModel) -> ModuleAnalysis:
    """Analyze a model on clean images: its predictions, its routing, and its accuracy with each expert muted.

    Without labels, statistics by class use the predicted classes.

    Args:
        opened: The model, with images.

    Raises:
        ConfigError: There are no images.
    """
    images, labels, model = opened.images, opened.labels, opened.model
    if images is None:
        raise ConfigError("images: expected clean images to look at the model with")
    with seeded(0, "look"):
        called = predict(model, images, precision=opened.precision)
    return ModuleAnalysis(
        name=opened.name,
        images=len(images),
        classes=opened.classes,
        predicted=called.bincount(minlength=opened.num_classes).cpu(),
        ba=None if labels is None else proportion_of(called == labels),
        class_ba={} if labels is None else _by_class(called, labels),
        muted=_muted(opened),
        **_routing(opened, images, called if labels is None else labels),
    )


def _routing(opened: OpenedModel, images: Tensor, labels: Tensor) -> dict[str, tuple]:
    if opened.routed is None:
        return {}
    model, classes, places = opened.routed, opened.num_classes, labels.cpu()
    with seeded(0, "routing"):
        layers = passes.run_pass(model, images, None, precision=opened.precision).clean.layers
    sums = patch_sums(images, model.patch_size).cpu()
    return {
        "routing": tuple(routing.layer_routing(layer, places, classes, model.patch_grid) for layer in layers),
        "pixels": tuple(
            pixels.layer_pixels(layer, sums, places, classes, model.patch_size) for layer in layers
        ),
    }


def _muted(opened: OpenedModel) -> dict[str, Proportion] | None:
    model, split = opened.model, opened.split
    if split is None or not isinstance(model, WithExperts):
        return None
    found = {}
    for expert in model.experts():
        with muted(model, [expert]), seeded(0, "look"):
            called = predict(model, split.images, precision=opened.precision)
        found[expert.name] = proportion_of(called == split.labels)
    return found


def _by_class(called: Tensor, labels: Tensor) -> dict[int, Proportion]:
    return {
        int(number): proportion_of(called[labels == number] == number)
        for number in torch.unique(labels).tolist()
    }
