"""Reading the files of CIFAR-10 and CIFAR-100, also inside their archives."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from backdoorbench_moe.data.base import Split
from backdoorbench_moe.data.safe_pickle import read_pickle
from backdoorbench_moe.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE

# Pixels (N, 3072) uint8 and labels (N,) int64.
Rows = tuple[np.ndarray, np.ndarray]
Name = TypeVar("Name")


def split_of(rows: list[Rows]) -> Split:
    """Return the images of several files as a split."""
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in rows]).reshape(-1, 3, SIDE, SIDE))
    return Split(images, torch.from_numpy(np.concatenate([labels for _, labels in rows])))


def read_file(path: Path) -> bytes:
    """Read a file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_members(
    path: Path, wanted: Mapping[str, Name], *, limit: int, what: str
) -> Iterator[tuple[Name, bytes, str]]:
    """Read files of an archive by their exact names, in one pass. Nothing is written to disk.

    Args:
        path: The archive.
        wanted: Keys of the files by their paths in the archive.
        limit: Largest size of such a file in bytes.
        what: Name of the data set, for error messages.

    Yields:
        For each file its key, its content, and its name for error messages.

    Raises:
        DataError: The archive is damaged, or one of the files is too large or not a plain file.
    """
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None:
                    continue
                file = archive.extractfile(member) if member.isreg() and member.size <= limit else None
                if file is None:
                    raise DataError(f"{path}: {member.name}: expected a plain file of at most {limit} bytes")
                yield name, file.read(), f"{path}: {member.name}"
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: expected {what}'s archive, cannot read it ({error})") from error


def parse_pickle(data: bytes, name: str, *, labels: str, classes: int) -> Rows:
    """Parse a pickle file of the "python" version.

    Args:
        data: Its content.
        name: Its name, for error messages.
        labels: The key of the labels in it.
        classes: Number of classes; labels must be below it.

    Raises:
        DataError: The file is damaged, or has other content.
    """
    content: dict[str, Any] = read_pickle(data, name)
    pixels, given = content.get("data"), content.get(labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        got = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{name}: data: expected bytes (N, {PIXELS}), got {got}")
    if not isinstance(given, list) or any(type(label) is not int for label in given):
        raise DataError(f"{name}: {labels}: expected a list of integers, got {type(given).__name__}")
    if any(abs(label) > 255 for label in given):  # They might not fit into int64.
        raise DataError(f"{name}: {labels}: expected numbers in 0..{classes - 1}, got larger ones")
    return check_rows(pixels, np.array(given, np.int64), name, classes)


def check_rows(pixels: np.ndarray, labels: np.ndarray, name: str, classes: int) -> Rows:
    """Return pixels and labels. Raises DataError if there is not one label in 0..classes-1 for each image."""
    if len(labels) != len(pixels):
        raise DataError(f"{name}: expected a label for each of {len(pixels)} images, got {len(labels)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{name}: expected labels in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return pixels, labels
