"""Convert clean images and labels from the caller to tensors, and check them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.data.listing import LeftOut, find_images
from backdoorbench_moe.errors import DataError, ShapeError, naming
from backdoorbench_moe.image_files import decode
from backdoorbench_moe.ops.images import Split, change_images
from backdoorbench_moe.ops.seeding import generator
from backdoorbench_moe.paths import expand

PathLike = str | os.PathLike[str]
Images = Tensor | np.ndarray | Split | PathLike


def take_images(
    images: Images,
    *,
    size: int | None,
    name: str = "images",
    classes: Sequence[str] = (),
    most: int | None = None,
) -> tuple[Tensor, Any]:
    """Return images as a tensor, with their labels if they have any.

    Args:
        images: (N, 3, S, S) uint8, or floats in [0, 1], which are rounded to 8 bits; a `Split`; or a folder of image
            files, at any depth, which are cropped to squares and resized.
        size: The side S; None for any side. If None, files are resized to the shorter side of the first one.
        name: The parameter, for error messages.
        classes: Names of the classes, by number. Files have labels if each is in a subfolder with the name of a class.
        most: The maximum number of files to read, drawn with a fixed seed; None for all.

    Returns:
        The images (N, 3, S, S) uint8, on their original device, and their labels, or None. The labels are not checked;
        see `take_labels`.

    Raises:
        DataError: A folder is missing or has no images, or a file cannot be read.
        ShapeError: The images have the wrong shape, type or range.
    """
    labels = None
    found: Any = images
    if isinstance(images, str | os.PathLike):
        found, labels = _read_folder(expand(images, name), size, name, classes, most)
    elif isinstance(images, Split):
        found, labels = images.images, images.labels
    return _as_bytes(found, size, name), labels


def take_labels(labels: Any, count: int, num_classes: int | None = None) -> Tensor:
    """Return labels as (N,) int64.

    Args:
        labels: N integers, in any type that `torch.as_tensor` accepts.
        count: Number N of images.
        num_classes: Number of classes; None if it is not known yet.

    Raises:
        ShapeError: The labels have the wrong shape, type or range.
    """
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"labels: expected {count} integers, got {type(labels).__name__}") from error
    if tuple(tensor.shape) != (count,) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ShapeError(f"labels: expected {count} integers, got {tuple(tensor.shape)} {tensor.dtype}")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        last = "" if num_classes is None else num_classes - 1
        raise ShapeError(f"labels: expected classes in 0..{last}, got {low}..{high}")
    return tensor.to(torch.int64)


def _as_bytes(images: Any, size: int | None, name: str) -> Tensor:
    """Convert images to (N, 3, S, S) uint8. Raises ShapeError if they have the wrong shape, type or range."""
    side = "S" if size is None else size
    wanted = f"{name}: expected shape (N, 3, {side}, {side})"
    try:
        tensor = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{wanted}, got {type(images).__name__}") from error
    shape = tuple(tensor.shape)
    if len(shape) != 4 or not shape[0] or shape[1:] != (3, size or shape[-1], size or shape[-1]):
        raise ShapeError(f"{wanted}, got {shape}")
    if tensor.dtype == torch.uint8:
        return tensor.contiguous()
    if not tensor.is_floating_point():
        raise ShapeError(f"{name}: expected uint8, or floats in [0, 1], got {tensor.dtype}")
    low, high = (float(value) for value in torch.aminmax(tensor.detach()))
    if not (low >= 0 and high <= 1):
        raise ShapeError(
            f"{name}: expected floats in [0, 1], got {low:g} to {high:g}; normalise images inside the model"
        )
    blank = torch.empty(shape, dtype=torch.uint8)
    values = tensor.detach().to("cpu", torch.float32)
    return change_images(blank, lambda _, part: values[part]).to(tensor.device)


def _read_folder(
    root: Path, size: int | None, name: str, classes: Sequence[str], most: int | None
) -> tuple[Tensor, Tensor | None]:
    """Read all images in a folder, and their labels if each image is in a subfolder with the name of a class."""
    if not root.is_dir():
        what = "a file" if root.exists() else "missing"
        raise DataError(f"{name}: expected a folder of images, {root} is {what}")
    left_out = LeftOut()
    paths = find_images(root, root, left_out)
    if not paths:
        raise DataError(f"{name}: expected a folder of images, found none in {root}")
    left_out.warn(f"{name}: {root}")
    if most is not None:
        order = torch.randperm(len(paths), generator=generator(0, "audit images"))[:most].tolist()
        paths = [paths[place] for place in order]
    with naming(name):
        images = read_images(paths, Form(size or min(decode(paths[0])[0].size), crop=True))
    places = {label: number for number, label in enumerate(classes)}
    tops = [path.relative_to(root).parts[0] for path in paths]
    # A file directly in the folder may also have the name of a class.
    if not all(path.parent != root and top in places for path, top in zip(paths, tops, strict=True)):
        return images, None
    return images, torch.tensor([places[top] for top in tops])
