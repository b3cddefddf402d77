"""Making a subject of what a user has: a run folder or a module, and images as a tensor, an array or a folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_moe.auditing.audit import digest_of
from backdoorbench_moe.auditing.store import Store
from backdoorbench_moe.auditing.subject import MOST_IMAGES, Subject, check_images, make_subject
from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.data.listing import LeftOut, find_images
from backdoorbench_moe.engine.device import resolve_device, resolve_precision
from backdoorbench_moe.engine.opened_run import draw_images, load_run_images
from backdoorbench_moe.engine.run import Run, check_finished, load_run
from backdoorbench_moe.engine.tasks import Tasks
from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.ops.images import Split, concatenate
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.paths import expand

# Of a run's test images so many are used, equally many of each class.
RUN_IMAGES, TASK_IMAGES = 200, 100
SEED = 0

PathLike = str | os.PathLike[str]


def open_run_subject(
    run: Run,
    *,
    images: PathLike | Tensor | np.ndarray | None = None,
    labels: Any = None,
    base: Any = None,
    tasks: Sequence[Any] | None = None,
    with_images: bool = True,
    data_root: str | None = None,
    device: str | None = None,
) -> Subject:
    """Open the model of a finished run for an audit. Its attack, its trigger and its poisoned images are not looked at.

    Args:
        run: The run.
        images: Clean images; if None, some of the run's test images, and for a mixture those of its tasks.
        labels: Their classes; see `open_module`.
        base: The base; see `open_module`.
        tasks: Images of each task; if None and `images` is None, those of the run.
        with_images: Whether to use the run's test images; False for what can be said from weights alone.
        data_root: Folder of the run's data, if it has moved.
        device: Where to compute; None for the run's own device.

    Raises:
        BbmoeError: The run is not finished, or its data or the images cannot be read or do not fit.
    """
    check_finished(run)
    data, spec = run.record.data, run.spec
    if images is None and with_images:
        split, own = _run_images(run, data_root)
        images, labels = split.images, split.labels
        tasks = own if tasks is None else tasks
    return open_module(
        run.model().to(memory_format=torch.channels_last),
        images=images,
        labels=labels,
        base=base,
        tasks=tasks or (),
        image_size=int(data["image_size"]),
        classes=data["classes"],
        device=device or spec.device,
        precision=spec.precision,
    )


def open_copy(model: nn.Module, *, device: str | None, **given: Any) -> Subject:
    """Make a subject of a copy of a module, on its own device if `device` is None. See `open_module`."""
    first = next(model.parameters(), None)
    place = device or ("cpu" if first is None else str(first.device))
    return open_module(copy.deepcopy(model), device=place, **given)


def open_module(
    model: nn.Module,
    *,
    images: PathLike | Tensor | np.ndarray | None = None,
    labels: Any = None,
    base: Any = None,
    tasks: Sequence[Any] = (),
    image_size: int | None = None,
    classes: Sequence[str] = (),
    device: str = "cpu",
    precision: str = "fp32",
) -> Subject:
    """Make a subject of a module.

    Args:
        model: The module.
        images: Clean images: (N, 3, S, S) uint8, or a folder of image files, at any depth, which are resized to
            `image_size` if it is known.
        labels: (N,) integers.
        base: What the experts were tuned from: a run, its folder, a module or a state dict.
        tasks: Images of each task, as for `images`.
        image_size: Side of the images in pixels, if the model takes only one size.
        classes: Names of the classes.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32" or "bf16".

    Raises:
        BbmoeError: Something cannot be read, or does not fit.
    """
    place = resolve_device(device)
    return make_subject(
        model,
        images=None if images is None else _images(images, image_size, "images"),
        labels=None if labels is None else _labels(labels),
        base=None if base is None else base_state(base),
        tasks=[_images(each, image_size, f"tasks[{n}]") for n, each in enumerate(tasks)],
        image_size=image_size,
        classes=classes,
        device=place,
        precision=resolve_precision(precision, place),
        seed=SEED,
    )


def with_store(subject: Subject, folder: Path | None) -> tuple[Subject, Store]:
    """Return the subject with a store in a folder, and the store."""
    store = Store(folder, digest_of(subject))
    return replace(subject, keep=store.keep()), store


def base_state(base: Any) -> Mapping[str, Tensor]:
    """Return the state dict of a base: a run, its folder, a module, or a state dict."""
    if isinstance(base, nn.Module):
        return base.state_dict()
    if isinstance(base, Mapping):
        return base
    if isinstance(base, Run):
        return base.model().state_dict()
    if isinstance(base, str | os.PathLike):
        return load_run(expand(base, "base")).model().state_dict()
    raise ConfigError.expected("base", "a run, its folder, a module or a state dict", type(base).__name__)


def _run_images(run: Run, data_root: str | None) -> tuple[Split, list[Tensor]]:
    """Return some of a run's clean test images, and those of each of its tasks if it is a mixture."""
    images = load_run_images(run, data_root)
    if run.spec.splitter is None:
        return _draw(images.test), []
    tests = Tasks(run.located_spec(), images).tests()
    each = max(1, RUN_IMAGES // len(tests))
    return concatenate([_draw(test, each) for test in tests]), [_draw(t, TASK_IMAGES).images for t in tests]


def _draw(split: Split, count: int = RUN_IMAGES) -> Split:
    place = draw_images(split.labels, min(count, len(split)), SEED)
    return Split(split.images[place].contiguous(), split.labels[place])


def _images(images: Any, size: int | None, name: str) -> Tensor:
    """Return images as a tensor, read from a folder if it is one."""
    if isinstance(images, str | os.PathLike):
        return read_folder(expand(images, name), size)
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    check_images(name, images)
    return images.contiguous()


def _labels(labels: Any) -> Tensor:
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError.expected(
            "labels", "one class number for each image", type(labels).__name__
        ) from error
    if found.is_floating_point() or found.dtype == torch.bool:
        raise ConfigError.expected("labels", "integers", str(found.dtype))
    return found.long()


def read_folder(folder: Path, size: int | None) -> Tensor:
    """Read the images in a folder, at any depth, at most `MOST_IMAGES` of them, in an order drawn with a fixed seed.

    Args:
        folder: The folder.
        size: Side that the images are resized to, the shorter side first, and then cropped; the shorter side of the
            first image if None.

    Raises:
        DataError: The folder cannot be read, has no images, or a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of images, found none")
    left_out = LeftOut()
    paths = find_images(folder, folder, left_out)
    left_out.warn(str(folder))
    if not paths:
        raise DataError(f"{folder}: there are no images in it")
    order = torch.randperm(len(paths), generator=generator(SEED, "audit images"))[:MOST_IMAGES].tolist()
    chosen = [paths[place] for place in order]
    if size is None:
        from backdoorbench_moe.image_files import decode

        size = min(decode(chosen[0])[0].size)
    return read_images(chosen, Form(size, crop=True))
