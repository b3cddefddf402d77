"""Creates a subject from a run folder or a module, and from images as a tensor, an array or a folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_moe.auditing.audit import digest_of
from backdoorbench_moe.auditing.store import Store
from backdoorbench_moe.auditing.subject import MOST_IMAGES, Subject, make_subject
from backdoorbench_moe.engine.device import resolve_device
from backdoorbench_moe.engine.opening.given_images import Images, take_images, take_labels
from backdoorbench_moe.engine.opening.opened_model import open_model
from backdoorbench_moe.engine.opening.opened_run import load_run_images
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.errors import ConfigError, naming
from backdoorbench_moe.moe.routed import undeclared_routing
from backdoorbench_moe.ops.images import Split, concatenate, draw_images
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.paths import expand

# Numbers of a run's test images that are used, equally many of each class: in all, and for each task of a mixture.
RUN_IMAGES, TASK_IMAGES = 200, 100
SEED = 0
NO_IMAGES = "labels: expected images with the labels, got none"


def open_run_subject(
    run: Run,
    *,
    images: Images | None = None,
    labels: Any = None,
    base: Any = None,
    tasks: Sequence[Images] | None = None,
    with_images: bool = True,
    data_root: str | None = None,
    device: str | None = None,
) -> Subject:
    """Open the model of a finished run for an audit. Its attack, trigger and poisoned images are not used.

    Args:
        run: The run.
        images: Clean images; None for some of the run's test images, which for a mixture are those of its tasks.
        labels: Classes of the images; see `open_module_subject`.
        base: The base; see `open_module_subject`.
        tasks: Images of each task; None for those of the run if `images` is None too.
        with_images: Whether to use the run's test images if `images` is None; False for an audit of the weights only.
        data_root: Folder of the run's data, if it was moved.
        device: The device; None for that of the run.

    Raises:
        BbmoeError: The run is not finished, or its data or the images cannot be read or do not fit.
    """
    opened = open_model(run, with_data=False, device=device)
    task_names: Sequence[str] = ()
    if images is None and labels is not None:
        raise ConfigError(NO_IMAGES)
    own_images = images is None
    if own_images and with_images:
        split, own, own_names = _run_images(run, data_root)
        images, labels = split.images, split.labels
        if tasks is None:
            tasks, task_names = own, own_names
    return _make(
        opened.model,
        images=images,
        labels=labels,
        base=base,
        tasks=tasks or (),
        task_names=task_names,
        image_size=opened.image_size,
        classes=opened.classes,
        device=opened.device,
        precision=opened.precision,
        in_order=own_images,
    )


def open_module_subject(
    model: nn.Module,
    *,
    images: Images | None = None,
    labels: Any = None,
    base: Any = None,
    tasks: Sequence[Images] | None = None,
    image_size: int | None = None,
    device: str | None = None,
) -> Subject:
    """Create a subject from a copy of a module.

    Args:
        model: The module.
        images: Clean images, see `engine.opening.given_images.take_images`; at most `MOST_IMAGES` of a folder are read.
        labels: (N,) integers.
        base: The model that the experts were fine-tuned from: a run, its folder, a module or a state dict.
        tasks: Images of each task, in the same formats as `images`.
        image_size: Side of the images in pixels, if the model takes only one size.
        device: "auto", "cpu", "cuda" or "cuda:N"; None for that of the module.

    Raises:
        BbmoeError: An argument cannot be read, or the arguments do not fit together.
    """
    if fault := undeclared_routing(type(model)):
        raise ConfigError(f"model: {fault}")
    first = next(model.parameters(), None)
    own = torch.device("cpu") if first is None else first.device
    place = own if device is None else resolve_device(device)
    return _make(
        copy.deepcopy(model),
        images=images,
        labels=labels,
        base=base,
        tasks=tasks or (),
        image_size=image_size,
        device=place,
    )


def _make(
    model: nn.Module,
    *,
    images: Images | None,
    labels: Any,
    base: Any,
    tasks: Sequence[Images],
    image_size: int | None,
    in_order: bool = False,
    **given: Any,
) -> Subject:
    """Read the images and the base, and create a subject.

    Args:
        in_order: Whether the images are already in the order of `spread`.
    """
    read = partial(take_images, size=image_size, most=MOST_IMAGES)
    found, own = (None, None) if images is None else read(images, classes=given.get("classes", ()))
    if labels is None:
        labels = own
    elif found is None:
        raise ConfigError(NO_IMAGES)
    elif isinstance(images, str | os.PathLike):
        raise ConfigError(
            "labels: expected none for a folder of images, whose subfolders have the names of classes"
        )
    if found is not None:
        labels = None if labels is None else take_labels(labels, len(found))
        found, labels = (found, labels) if in_order else spread(found, labels)
    return make_subject(
        model,
        images=found,
        labels=labels,
        base=None if base is None else base_state(base),
        tasks=[read(each, name=f"tasks[{number}]")[0] for number, each in enumerate(tasks)],
        image_size=image_size,
        seed=SEED,
        **given,
    )


def spread(images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sort images so that the first ones, which checks use, are of all classes.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64; None for a random order.

    Returns:
        Images and labels in the new order: one image of each class, then a second one of each, and so on.
    """
    if labels is None:
        place = torch.randperm(len(images), generator=generator(SEED, "audit order"))
        return images[place.to(images.device)], None
    # The labels may be any integers, since the classes of the model are not known yet.
    kinds = labels.cpu().unique(return_inverse=True)[1]
    place = draw_images(kinds, len(kinds), SEED)
    return images[place.to(images.device)], labels[place.to(labels.device)]


def with_store(subject: Subject, folder: Path | None, digest: str | None = None) -> tuple[Subject, Store]:
    """Return the subject with a store in a folder, and the store.

    Args:
        subject: The subject.
        folder: The folder of the audit; None to store nothing.
        digest: The result of `digest_of` for the subject, if it is known.
    """
    store = Store(folder, digest or digest_of(subject))
    return replace(subject, keep=store.keep()), store


def base_state(base: Any) -> Mapping[str, Tensor]:
    """Return the tensors of a base: a run, its folder, a module, or a state dict.

    Raises:
        ConfigError: It is something else, such as a checkpoint with a state dict in it.
    """
    if isinstance(base, Run | str | os.PathLike):
        with naming("base"):
            run = base if isinstance(base, Run) else load_run(expand(base))
            return run.model().state_dict()
    if isinstance(base, nn.Module):
        base = base.state_dict()
    if not isinstance(base, Mapping):
        raise ConfigError.expected("base", "a run, its folder, a module or a state dict", type(base).__name__)
    tensors = {str(name): each for name, each in base.items() if isinstance(each, Tensor)}
    if base and not tensors:
        raise ConfigError.expected(
            "base", "a state dict, which maps names to tensors", f"a mapping with the keys {list(base)}"
        )
    return tensors


def _run_images(run: Run, data_root: str | None) -> tuple[Split, list[Tensor], list[str]]:
    """Return some of a run's clean test images and, for a mixture, images of each task and the tasks' names."""
    found = load_run_images(run, data_root)
    if run.spec.splitter is None:
        return _draw(found.test), [], []
    split = Tasks(run.located_spec(), found)
    tests = split.tests()
    each = max(1, RUN_IMAGES // len(tests))
    mixed = concatenate([_draw(test, each) for test in tests])
    images, labels = spread(mixed.images, mixed.labels)
    assert labels is not None
    return Split(images, labels), [_draw(test, TASK_IMAGES).images for test in tests], split.names


def _draw(split: Split, count: int = RUN_IMAGES) -> Split:
    place = draw_images(split.labels, min(count, len(split)), SEED)
    return Split(split.images[place].contiguous(), split.labels[place])
