"""Images as rows of a file, which are read on demand."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.paths import cache_root

MEMORY_VARIABLE = "BBMOE_MEMORY"
DEFAULT_MEMORY = "500MB"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_limit() -> int:
    """Return how many bytes of images may be held in memory as one tensor: $BBMOE_MEMORY, 500 MB by default.

    Raises:
        ConfigError: The variable is not a number of bytes such as 500MB or 20GB.
    """
    text = os.environ.get(MEMORY_VARIABLE) or DEFAULT_MEMORY
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError.expected(f"${MEMORY_VARIABLE}", "a size such as 500MB or 20GB", text)
    return int(float(found[1]) * UNITS[(found[2] or "").upper().removeprefix("B")])


class Rows(Protocol):
    """Images (N, *shape) uint8 that can be read by index."""

    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Number N of images."""

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Read images into an array.

        Args:
            rows: (n,) int64, their indices in any order.
            out: (n, *shape) uint8, contiguous.

        Raises:
            DataError: The file is damaged or cannot be read.
        """


class TensorRows:
    """Images in memory, as `Rows`.

    Args:
        images: (N, ...) uint8, on any device. They must not be written to afterwards.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images into an array; see `Rows.read`."""
        out[:] = self.images.numpy()[rows]


class FileRows:
    """Consecutive images in a file, as `Rows`.

    They are read with `preadv` into buffers of the caller, not memory-mapped: the pages of a map count as memory of the
    process as long as the system keeps them, and the process crashes if a mapped file is truncated.

    Args:
        descriptor: Descriptor of the file, opened for reading; it is closed with this object.
        name: Path of the file, for error messages.
        count: Number N of images.
        shape: Shape of an image, such as (3, H, W).
        offset: Number of bytes before the first image.
        checksums: (N,) uint32, the CRC-32 of each image, which is checked when the image is first read; None to check
            nothing.
        repair: Function that recomputes an image, given its index; None if an image with a wrong checksum is an error.
    """

    def __init__(
        self,
        descriptor: int,
        name: str,
        count: int,
        shape: tuple[int, ...],
        *,
        offset: int = 0,
        checksums: np.ndarray | None = None,
        repair: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.descriptor, self.name, self.count, self.shape, self.offset = (
            descriptor,
            name,
            count,
            shape,
            offset,
        )
        weakref.finalize(self, os.close, descriptor)
        self.checksums, self.repair = checksums, repair
        self.row_bytes = int(np.prod(shape))
        self._checked = np.zeros(count, bool)

    def __len__(self) -> int:
        return self.count

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Read images into an array, runs of consecutive ones at once; see `Rows.read`."""
        flat = out.reshape(len(rows), self.row_bytes)
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, stop in pairwise([0, *ends.tolist(), len(rows)]):
            if start < stop:
                self._fill(flat[start:stop].reshape(-1), int(rows[start]))
        if self.checksums is not None:
            for place in np.flatnonzero(~self._checked[rows]):
                self._check(int(rows[place]), flat[place])

    def _fill(self, out: np.ndarray, row: int) -> None:
        place, view = self.offset + row * self.row_bytes, out.data
        while view:
            try:
                done = os.preadv(self.descriptor, [view], place)
            except OSError as error:
                raise DataError(f"{self.name}: cannot be read ({error.strerror})") from error
            if not done:
                raise DataError(f"{self.name}: became shorter while it was read; start again")
            place, view = place + done, view[done:]

    def _check(self, row: int, pixels: np.ndarray) -> None:
        assert self.checksums is not None
        wanted = int(self.checksums[row])
        if zlib.crc32(pixels.data) == wanted:
            self._checked[row] = True
            return
        fresh = None if self.repair is None else self.repair(row)
        if fresh is None or zlib.crc32(np.ascontiguousarray(fresh).data) != wanted:
            raise DataError(
                f"{self.name}: image {row} is damaged, and its file is not the one it was read from any more; "
                "start again"
            )
        pixels[:] = fresh.reshape(-1)
        # If the file is not writable, the image is repaired in memory each time it is read.
        with suppress(OSError), Path(self.name).open("r+b") as file:
            write_at(file.fileno(), pixels, self.offset + row * self.row_bytes)
            self._checked[row] = True


def write_at(descriptor: int, pixels: np.ndarray, place: int) -> None:
    """Write a contiguous array at an offset in an open file. Raise OSError if writing fails."""
    view = pixels.data.cast("B")
    while view:
        done = os.pwrite(descriptor, view, place)
        place, view = place + done, view[done:]


def gigabytes(size: int) -> str:
    """Format a number of bytes, such as "30.1 GB"."""
    return f"{size / 10**9:.1f} GB" if size >= 10**8 else f"{size / 10**6:.1f} MB"


def check_space(folder: Path, size: int, what: str) -> None:
    """Check that a disk has enough space.

    Args:
        folder: An existing folder on the disk.
        size: Number of bytes that are needed.
        what: What the space is for, a plural for the message.

    Raises:
        DataError: The disk does not have enough space.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder}: cannot be used for {what} ({error.strerror})") from error
    if free < size:
        raise DataError(
            f"{folder}: {what} need {gigabytes(size)}, and {gigabytes(free)} are free; "
            "set $BBMOE_CACHE to a folder with more space"
        )


class Scratch:
    """Images that are written to an unnamed temporary file, which is deleted when it is no longer used.

    Args:
        count: Number N of images.
        shape: Shape of an image.

    Raises:
        DataError: There is not enough space, or the cache folder cannot be written.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        folder = cache_root()
        self.row_bytes = int(np.prod(shape))
        what = f"{count:,} changed images"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_space(folder, count * self.row_bytes, what)
            with tempfile.TemporaryFile(dir=folder) as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error.strerror}); {what} do not fit into memory"
            ) from error
        self.rows = FileRows(descriptor, f"{folder} (temporary file)", count, shape)

    def __setitem__(self, part: slice, images: Tensor) -> None:
        """Write consecutive images, (n, *shape), which are rounded down to uint8."""
        pixels = images.to("cpu", torch.uint8).contiguous().numpy()
        try:
            write_at(self.rows.descriptor, pixels, part.start * self.row_bytes)
        except OSError as error:
            raise DataError(f"{self.rows.name}: cannot be written ({error.strerror})") from error
