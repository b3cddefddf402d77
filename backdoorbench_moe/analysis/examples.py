"""Patch maps: which patches of some images each expert processes, clean and triggered, in one model and another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backdoorbench_moe.analysis.subject import Subject, choose_images
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.parts import Stamper
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.engine.step import as_input
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
class Examples:
    """N test images. indices: (N,) int64. labels: the N true class names.

    clean, triggered: (N, 3, S, S) uint8, PNG files in base64 in the JSON document; triggered is None without a
    trigger.
    models: the run's own first, then the one it is compared with.
    """

    indices: Tensor
    labels: tuple[str, ...]
    models: tuple[ModelMaps, ...]
    clean: Tensor = field(metadata=PICTURES)
    triggered: Tensor | None = field(metadata=PICTURES)


def check_images(images: Sequence[int] | None, count: int) -> None:
    """Raise ConfigError unless these are 1 to MAX_IMAGES places among `count` test images."""
    if images is None:
        return
    if not 1 <= len(images) <= MAX_IMAGES:
        raise ConfigError.expected("images", f"1 to {MAX_IMAGES} test images", len(images))
    for index in images:
        if not 0 <= index < count:
            raise ConfigError.expected("images", f"test images in 0..{count - 1}", index)


def choose_examples(labels: Tensor, counted: Tensor | None, seed: int) -> list[int]:
    """Draw test images, one of each class in turn, of those that count for ASR where there is a trigger.

    labels: (N,) int64. counted: (M,) int64 places that count; None for all.
    """
    places = torch.arange(len(labels)) if counted is None else counted
    return places[choose_images(labels[places], DEFAULT_COUNT, seed)].tolist()


def make_examples(subjects: Sequence[Subject], indices: Sequence[int], stamper: Stamper | None) -> Examples:
    """Maps of test images in every subject's model. stamper: the trigger to show, if any."""
    images, places = subjects[0].images, torch.tensor(list(indices))
    clean = images.test.images[places.to(images.test.images.device)]
    triggered = None if stamper is None else stamp_images(clean, stamper)
    names = images.classes
    maps = tuple(
        ModelMaps(
            subject.name,
            _see(subject, clean, names),
            None if triggered is None else _see(subject, triggered, names),
        )
        for subject in subjects
    )
    labels = tuple(names[label] for label in images.test.labels.cpu()[places].tolist())
    return Examples(places, labels, maps, clean.cpu(), None if triggered is None else triggered.cpu())


@torch.inference_mode()
def _see(subject: Subject, images: Tensor, classes: Sequence[str]) -> Seen:
    layers: tuple[LayerMaps, ...] = ()
    with autocast(subject.device, subject.precision):
        if (model := subject.routed) is None:
            logits = subject.model(as_input(images))
        else:
            output = model.forward_routed(as_input(images))
            logits = output.logits
            layers = tuple(
                LayerMaps(one.layer, one.selected.unflatten(-1, model.patch_grid).cpu())
                for one in output.routing
            )
    return Seen(tuple(classes[c] for c in logits.argmax(1).tolist()), layers)
