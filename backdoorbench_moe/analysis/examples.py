"""Patch maps: which patches of some images each expert processes, clean and triggered, in one model and another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from backdoorbench_moe.analysis.subject import Subject, choose_images
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.data.images import read_images
from backdoorbench_moe.engine.build import Stamper
from backdoorbench_moe.engine.inference import forward, forward_routed
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.errors import ConfigError

DEFAULT_COUNT = 6
MAX_IMAGES = 100
# Of a dataclass field that holds images: how the JSON document gives it.
PICTURES = {"document": "png"}


@dataclass(frozen=True)
class LayerMaps:
    """selected: (N, E, rows, columns) bool, the patches each expert of a routed layer takes."""

    layer: str
    selected: Tensor


@dataclass(frozen=True)
class Seen:
    """What one model does with N images. predicted: the N class names. layers: none of a dense model."""

    predicted: tuple[str, ...]
    layers: tuple[LayerMaps, ...]


@dataclass(frozen=True)
class ModelMaps:
    """One model's view of the clean images and of the triggered ones; `triggered` is None without a trigger."""

    run: str
    clean: Seen
    triggered: Seen | None


@dataclass(frozen=True)
class Picked:
    """N images to look at: (N, 3, S, S) uint8 on the data's device.

    indices: places in the test split, None for a file. names: such as "test image 7", or the file's name. labels:
    class names; None for a file, whose class nobody knows.
    """

    indices: tuple[int | None, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    images: Tensor


@dataclass(frozen=True)
class Examples:
    """N images and what the models do with them. indices, names, labels: as of `Picked`.

    clean, triggered: (N, 3, S, S) uint8, PNG files in base64 in the JSON document; triggered is None without a
    trigger.
    models: the run's own first, then the one it is compared with.
    """

    indices: tuple[int | None, ...]
    names: tuple[str, ...]
    labels: tuple[str | None, ...]
    models: tuple[ModelMaps, ...]
    clean: Tensor = field(metadata=PICTURES)
    triggered: Tensor | None = field(metadata=PICTURES)


def pick_images(wanted: Sequence[int | str | Path], images: ImageSet) -> Picked:
    """Test images by their number, and image files by their path; these are resized, and cut if not square.

    Raises ConfigError unless these are 1 to MAX_IMAGES and the numbers are there, DataError for a file that is no
    image.
    """
    test, names = images.test, images.classes
    if not 1 <= len(wanted) <= MAX_IMAGES:
        raise ConfigError.expected("images", f"1 to {MAX_IMAGES} images", len(wanted))
    parts: list[Tensor] = []
    labels: list[str | None] = []
    for one in wanted:
        if not isinstance(one, int):
            parts.append(read_images([Path(one)], images.image_size, crop=True).to(test.images.device))
            labels.append(None)
        elif 0 <= one < len(test):
            parts.append(test.images[one : one + 1])
            labels.append(names[int(test.labels[one])])
        else:
            raise ConfigError.expected("images", f"test images in 0..{len(test) - 1}, or files", one)
    return Picked(
        indices=tuple(one if isinstance(one, int) else None for one in wanted),
        names=tuple(f"test image {one}" if isinstance(one, int) else Path(one).name for one in wanted),
        labels=tuple(labels),
        images=torch.cat(parts),
    )


def choose_examples(labels: Tensor, counted: Tensor | None, seed: int) -> list[int]:
    """Draw test images, one of each class in turn, of those that count for ASR where there is a trigger.

    labels: (N,) int64. counted: (M,) int64 places that count; None for all.
    """
    places = torch.arange(len(labels)) if counted is None else counted
    return places[choose_images(labels[places], DEFAULT_COUNT, seed)].tolist()


def make_examples(subjects: Sequence[Subject], picked: Picked, stamper: Stamper | None) -> Examples:
    """Maps of images in every subject's model. stamper: the trigger to show, if any."""
    clean, names = picked.images, subjects[0].images.classes
    triggered = None if stamper is None else stamp_images(clean, stamper)
    maps = tuple(
        ModelMaps(
            subject.name,
            _see(subject, clean, names),
            None if triggered is None else _see(subject, triggered, names),
        )
        for subject in subjects
    )
    return Examples(
        indices=picked.indices,
        names=picked.names,
        labels=picked.labels,
        models=maps,
        clean=clean.cpu(),
        triggered=None if triggered is None else triggered.cpu(),
    )


@torch.inference_mode()
def _see(subject: Subject, images: Tensor, classes: Sequence[str]) -> Seen:
    layers: tuple[LayerMaps, ...] = ()
    if (model := subject.routed) is None:
        logits = forward(subject.model, images, precision=subject.precision)
    else:
        output = forward_routed(model, images, precision=subject.precision)
        logits = output.logits
        layers = tuple(
            LayerMaps(one.layer, one.selected.unflatten(-1, model.patch_grid).cpu()) for one in output.routing
        )
    return Seen(tuple(classes[c] for c in logits.argmax(1).tolist()), layers)
