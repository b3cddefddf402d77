"""Reading files of `torch.save`, in the zip or the legacy format, without `torch.load`.

`torch.load(weights_only=True)` runs no code of the file either. But it creates whatever the file requests, such as an
array of any shape or an expanded tensor of any size, and it accepts more types than these files contain.
"""

from __future__ import annotations

import contextlib
import mmap
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.interop.archive import LOCAL, Archive
from backdoorbench_moe.interop.storages import TORCH, Storage, Storages, little_endian
from backdoorbench_moe.pickles import Limits, check_structure, read_value

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MOST_BYTES = 4 << 30
LIMITS = Limits()
# The headers of the legacy format are two numbers and a few settings.
HEAD = Limits(nbytes=10_000, operations=1000)
# The readable types, for the message about other globals.
ONLY = "tensors and numpy arrays"


def read_torch_file(path: Path) -> object:
    """Read a file of `torch.save` with dicts, lists, strings, numbers, tensors and numpy arrays.

    Args:
        path: The file.

    Returns:
        The content. Tensors are on the CPU, and arrays are `pickles.PickledArray`.

    Raises:
        DataError: The file is missing, damaged or too large, or has other content; the message names the file.
    """
    try:
        with mapped(path) as data:
            value = _read_archive(data) if data[:4] == LOCAL else _read_old(data)
            check_structure([value], LIMITS.depth)
            return value
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file into memory inside the block. Raises DataError if it is not a file, empty or too large."""
    try:
        with path.open("rb") if path.is_file() else _no_file(path) as file:
            size = path.stat().st_size
            if not 0 < size <= MOST_BYTES:
                raise DataError(f"expected a file of 1 to {MOST_BYTES} bytes, got {size}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from None


def _no_file(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise DataError(
            "not found" if isinstance(error, FileNotFoundError) else str(error.strerror)
        ) from None
    if stat.S_ISLNK(mode):
        raise DataError("expected a file, got a link that leads to no file")
    raise DataError(
        "expected a file, got a folder" if stat.S_ISDIR(mode) else "expected a file, got a pipe or device"
    )


def _read_archive(data: mmap.mmap) -> object:
    archive = Archive(data)
    if "byteorder" in archive.members:
        small = archive.members["byteorder"].size <= len(b"little")
        if not (small and bytes(archive.read("byteorder")) == b"little" and little_endian()):
            raise DataError("expected numbers in little-endian order")

    def make(key: str, dtype: torch.dtype, count: int) -> Tensor:
        member, size = archive.members.get(f"data/{key}"), count * dtype.itemsize
        if member is None or member.size != size:
            got = "none" if member is None else f"{member.size}"
            raise DataError(f"refused storage {key}: expected {size} bytes, got {got}")
        return (
            torch.frombuffer(archive.read(f"data/{key}"), dtype=dtype)
            if count
            else torch.empty(0, dtype=dtype)
        )

    if "data.pkl" not in archive.members:
        raise DataError("expected an archive of torch.save, with data.pkl in it")
    if archive.members["data.pkl"].size > LIMITS.nbytes:
        raise DataError(
            f"expected a pickle of at most {LIMITS.nbytes} bytes, got {archive.members['data.pkl'].size}"
        )
    pickled, storages = bytes(archive.read("data.pkl")), Storages(make)
    value, end = read_value(pickled, TORCH, persistent=storages.resolve, limits=LIMITS, only=ONLY)
    if end != len(pickled):
        raise DataError("damaged archive: something follows the pickle in data.pkl")
    return value


def _read_old(data: mmap.mmap) -> object:
    """Read the format of PyTorch before 1.6: five pickles, then the storages, each a count and its numbers."""
    if data[:1] != b"\x80":
        raise DataError("expected a file of torch.save")
    magic, position = read_value(data, {}, limits=HEAD, only="numbers")
    if magic != MAGIC:
        raise DataError("expected a file of torch.save, got another pickle")
    protocol, position = read_value(data, {}, start=position, limits=HEAD, only="numbers")
    system, position = read_value(data, {}, start=position, limits=HEAD, only="numbers")
    if protocol != PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DataError("expected a file of torch.save in protocol 1001 and little-endian order")
    announced = 0

    def make(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal announced
        announced += count * dtype.itemsize
        if announced > len(data):
            raise DataError(f"refused storage {key}: expected {count} numbers, of which the file has fewer")
        return torch.empty(count, dtype=dtype)

    storages = Storages(make)
    value, position = read_value(
        data, TORCH, start=position, persistent=storages.resolve, limits=LIMITS, only=ONLY
    )
    keys, position = read_value(data, {}, start=position, limits=LIMITS, only="names")
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise DataError("damaged file: expected the names of its storages")
    if sorted(keys) != sorted(storages.known):
        raise DataError("damaged file: expected the names of its storages")
    for key in keys:
        position = _fill(storages.known[key], data, position)
    if position != len(data):
        raise DataError("damaged file: something follows its last storage")
    return value


def _fill(storage: Storage, data: mmap.mmap, position: int) -> int:
    """Read the numbers of a storage into the memory of its tensors, and return the next position."""
    values = storage.values
    end = position + 8 + len(values) * values.itemsize
    if end > len(data) or struct.unpack("<q", data[position : position + 8])[0] != len(values):
        raise DataError(
            f"refused storage {storage.key}: it does not have the {len(values)} numbers that it should"
        )
    if len(values):
        values.copy_(torch.frombuffer(bytearray(data[position + 8 : end]), dtype=values.dtype))
    return end
