"""Tensors in files of `torch.save`, whose descriptions are checked against the data in the file."""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles import NUMPY, Global, Stateful

MOST_AXES = 8
# Sizes, strides and products of sizes must be below this, so that they fit into torch's integers.
LARGEST = 1 << 40
MOST_TENSORS = 20_000
# The dtypes of BackdoorBench's models and backdoor-toolbox's tensors.
STORAGES = {"FloatStorage": torch.float32, "LongStorage": torch.int64}


@dataclass(frozen=True)
class Storage:
    """The numbers of which tensors are views.

    Attributes:
        key: Its name in the file.
        values: (N,) all numbers.
        used: The ranges [first, end) that existing tensors use, in ascending order.
    """

    key: str
    values: Tensor
    used: list[tuple[int, int]]

    def claim(self, first: int, behind: int) -> None:
        """Mark a range as used by a tensor. Raises DataError if it overlaps another, or there are too many."""
        place = bisect.bisect(self.used, (first, behind))
        beside = self.used[max(0, place - 1) : place + 1]
        if any(start < behind and first < end for start, end in beside):
            raise DataError(f"refused two tensors that overlap in storage {self.key}")
        if len(self.used) >= MOST_TENSORS:
            raise DataError(f"expected at most {MOST_TENSORS} tensors, got more")
        self.used.insert(place, (first, behind))


class Storages:
    """The storages of a file. Each is read once, when the pickle first refers to it.

    Args:
        make: Returns the numbers of a storage with a key, dtype and count, which it checks against the file.
    """

    def __init__(self, make: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self._make = make
        self.known: dict[str, Storage] = {}

    def resolve(self, pid: object) -> Storage:
        """Return the storage for a persistent id: ("storage", type, key, place, count), and None in old files.

        Raises:
            DataError: The id has another format, or does not match the data in the file.
        """
        match pid:
            case ("storage", Global(name=name), str(key), str(), int(count), *view) if view in ([], [None]):
                dtype = STORAGES.get(name.removeprefix("torch."))
                if dtype is None or type(count) is not int or not 0 <= count < 1 << 40 or not key.isdecimal():
                    raise DataError(
                        f"refused storage {key[:40]!r}: expected numbers of type {' or '.join(STORAGES)}"
                    )
            case _:
                raise DataError("refused a reference to something else than a storage")
        if key not in self.known:
            if len(self.known) >= MOST_TENSORS:
                raise DataError(f"expected at most {MOST_TENSORS} storages, got more")
            self.known[key] = Storage(key, self._make(key, dtype, count), [])
        storage = self.known[key]
        if storage.values.dtype != dtype or len(storage.values) != count:
            raise DataError(f"refused storage {key}, which is described in two ways")
        return storage


class Named(dict[str, Any], Stateful):
    """An ordered dict, such as a state dict. The versions of modules that are attached to it are dropped."""

    def set_state(self, state: object) -> None:
        """Accept the attributes; torch attaches `_metadata`."""
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise DataError("refused attributes of a dict other than _metadata")


def _ordered_dict(arguments: tuple[Any, ...]) -> Named:
    if arguments:
        raise DataError("expected an empty ordered dict, whose items follow")
    return Named()


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Return the tensor for (storage, offset, size, stride, requires_grad, hooks).

    Raises:
        DataError: It exceeds the storage, overlaps itself or another tensor, or has hooks.
    """
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), dict(hooks)):
            pass
        case _:
            raise DataError("expected storage, offset, size and stride of a tensor")
    whole = (offset, *size, *stride)
    if (
        hooks
        or len(size) != len(stride)
        or len(size) > MOST_AXES
        or any(type(n) is not int or n < 0 for n in whole)
    ):
        raise DataError("refused a tensor with hooks, or with a size or stride that is none")
    count = math.prod(size)
    if offset + count > len(storage.values):
        raise DataError(
            f"refused a tensor of {count} numbers from {offset} on, outside its storage {storage.key} of "
            f"{len(storage.values)}"
        )
    if count and not _dense(size, stride):
        raise DataError(
            f"refused a tensor of size {size} and stride {stride}: its numbers overlap or lie apart"
        )
    # Not covered by the checks above: axes of tensors without numbers, and strides of axes of length 1.
    if max(whole) >= LARGEST or math.prod(max(1, n) for n in size) >= LARGEST:
        raise DataError(f"refused a tensor of size {size} and stride {stride}: larger than any that is read")
    if not count:
        return storage.values.new_empty(size)
    storage.claim(offset, offset + count)
    return storage.values.as_strided(size, stride, offset)


def _dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether a tensor is dense, for any order of its axes."""
    expected = 1
    for step, length in sorted(
        (step, length) for step, length in zip(stride, size, strict=True) if length != 1
    ):
        if step != expected:
            return False
        expected *= length
    return True


def little_endian() -> bool:
    """Return whether this machine is little-endian, like the files."""
    return sys.byteorder == "little"


# All globals in BackdoorBench's files; no others are allowed.
TORCH: dict[tuple[str, str], Global] = {
    ("collections", "OrderedDict"): Global("collections.OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor_v2"): Global("torch._utils._rebuild_tensor_v2", _tensor),
    **{("torch", name): Global(f"torch.{name}") for name in STORAGES},
    **NUMPY,
}
