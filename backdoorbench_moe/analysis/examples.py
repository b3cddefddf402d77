"""Patch maps: which patches of clean and triggered example images each expert processes, in one or two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import forward
from backdoorbench_moe.ops.images import as_input, draw_images
from backdoorbench_moe.ops.seeding import seeded

DEFAULT_COUNT = 6
MAX_IMAGES = 100
# Metadata of dataclass fields that hold images: the JSON document stores them as PNG files.
PICTURES = {"document": "png"}


@dataclass(frozen=True)
class LayerMaps:
    """Patch maps of one routed layer.

    Attributes:
        layer: Name of the layer.
        selected: (N, E, rows, columns) bool, whether an expert processes a patch of an image.
    """

    layer: str
    selected: Tensor


@dataclass(frozen=True)
class MappedPredictions:
    """Predictions and patch maps of one model for N images.

    Attributes:
        predicted: Names of the N predicted classes.
        layers: Patch maps of the routed layers; empty for a dense model.
    """

    predicted: tuple[str, ...]
    layers: tuple[LayerMaps, ...]


@dataclass(frozen=True)
class ModelMaps:
    """Predictions and patch maps of one model for the examples.

    Attributes:
        run: Name of the model's run folder.
        clean: Those for the clean images.
        triggered: Those for the triggered images; None without a trigger.
    """

    run: str
    clean: MappedPredictions
    triggered: MappedPredictions | None


@dataclass(frozen=True)
class ExampleImages:
    """N images, from the test split or from files.

    Attributes:
        indices: Index of each image in the test split; None for a file.
        names: Name of each image, such as "test image 7", or the name of the file.
        labels: Class name of each image; None for a file.
        images: (N, 3, S, S) uint8, on the device of the data.
    """

    indices: tuple[int | None, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    images: Tensor


@dataclass(frozen=True)
class Examples:
    """N example images and their patch maps.

    Attributes:
        indices: Index of each image in the test split; None for a file.
        names: Name of each image, such as "test image 7", or the name of the file.
        labels: Class name of each image; None for a file.
        models: Patch maps in the run's model and, if there is one, in the model that it is compared with.
        clean: (N, 3, S, S) uint8; in the JSON document a list of PNG files in base64.
        triggered: The triggered images, in the same format; None without a trigger.
    """

    indices: tuple[int | None, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    models: tuple[ModelMaps, ...]
    clean: Tensor = field(metadata=PICTURES)
    triggered: Tensor | None = field(metadata=PICTURES)


def collect_examples(wanted: Sequence[int | str | Path], images: ImageSet) -> ExampleImages:
    """Collect example images.

    Args:
        wanted: 1 to MAX_IMAGES images, given as indices in the test split or paths of image files. Images from files
            are resized, and cropped if they are not square.
        images: The data.

    Raises:
        ConfigError: There are too few or too many images, or an index is out of range.
        DataError: A file cannot be read as an image.
    """
    test, names = images.test, images.classes
    if not 1 <= len(wanted) <= MAX_IMAGES:
        raise ConfigError.expected("images", f"1 to {MAX_IMAGES} images", len(wanted))
    parts: list[Tensor] = []
    labels: list[str | None] = []
    for one in wanted:
        if not isinstance(one, int):
            parts.append(read_images([Path(one)], Form(images.image_size, crop=True)).to(test.images.device))
            labels.append(None)
        elif 0 <= one < len(test):
            parts.append(test.images[one : one + 1])
            labels.append(names[int(test.labels[one])])
        else:
            raise ConfigError.expected("images", f"test images in 0..{len(test) - 1}, or files", one)
    return ExampleImages(
        indices=tuple(one if isinstance(one, int) else None for one in wanted),
        names=tuple(f"test image {one}" if isinstance(one, int) else Path(one).name for one in wanted),
        labels=tuple(labels),
        images=torch.cat(parts),
    )


def draw_examples(labels: Tensor, counted: Tensor | None, seed: int) -> list[int]:
    """Draw DEFAULT_COUNT test images class by class, see `draw_images`.

    Args:
        labels: (N,) int64, classes of the test images.
        counted: (M,) int64, indices of the test images that count for ASR, from which the images are drawn; None to
            draw from all test images.
        seed: The seed.

    Returns:
        Indices in the test split.
    """
    places = torch.arange(len(labels)) if counted is None else counted
    return places[draw_images(labels[places], DEFAULT_COUNT, seed)].tolist()


def make_examples(runs: Sequence[OpenedRun], images: ExampleImages, stamper: Stamper | None) -> Examples:
    """Compute the patch maps of example images in the model of each run.

    Args:
        runs: The runs, on the same data.
        images: The images.
        stamper: Applies the trigger; None for clean images only.
    """
    clean, names = images.images, runs[0].images.classes
    triggered = None if stamper is None else stamp_images(clean, stamper)
    seed = runs[0].run.spec.seed
    maps = tuple(
        ModelMaps(
            opened.name,
            _predict(opened, clean, names, seed),
            None if triggered is None else _predict(opened, triggered, names, seed),
        )
        for opened in runs
    )
    return Examples(
        indices=images.indices,
        names=images.names,
        labels=images.labels,
        models=maps,
        clean=clean.cpu(),
        triggered=None if triggered is None else triggered.cpu(),
    )


@torch.inference_mode()
def _predict(opened: OpenedRun, images: Tensor, classes: Sequence[str], seed: int) -> MappedPredictions:
    # A model may draw random numbers: the draws are the same for clean and triggered images.
    with seeded(seed, "examples"), autocast(images.device, opened.precision):
        logits, routing = forward(opened.model, as_input(images))
    grid = () if opened.routed is None else opened.routed.patch_grid
    layers = tuple(LayerMaps(layer.layer, layer.selected.unflatten(-1, grid).cpu()) for layer in routing)
    return MappedPredictions(tuple(classes[c] for c in logits.argmax(1).tolist()), layers)
