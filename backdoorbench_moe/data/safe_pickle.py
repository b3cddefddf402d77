"""A safe reader for the pickle files of CIFAR-10: it refuses pickles with any other content."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from backdoorbench_moe.errors import DataError

UNSIGNED_BYTES = ("u1", "|u1", "uint8")


def read_pickle(data: bytes, name: str) -> dict[str, Any]:
    """Read a pickle file of CIFAR-10: a dict of strings, numbers, lists and uint8 arrays.

    No code that the file refers to is imported or called. The few globals that these files refer to are replaced by
    stand-ins, which only keep bytes and shapes.

    Args:
        data: Content of the file.
        name: Name of the file, for error messages.

    Returns:
        The dict, with strings as keys. Strings among the values that were written by Python 2 are bytes.

    Raises:
        DataError: The file is damaged, has other content, or refers to another global, which the message names.
    """
    try:
        _check_memo(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # A damaged pickle can fail in any way.
        raise DataError(f"{name}: damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: expected a dict, got {type(content).__name__}")
    if not all(isinstance(key, str | bytes) for key in content):
        raise DataError(f"{name}: expected a dict with texts as keys")
    return {
        _text(key): value.array(name) if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _check_memo(data: bytes) -> None:
    """Raise DataError if a pickle stores an object under a number that is larger than the file.

    The unpickler keeps stored objects in an array that reaches up to the largest number: five bytes could make it
    allocate 64 GB.
    """
    for opcode, argument, _ in pickletools.genops(data):
        stored = argument if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") else None
        if isinstance(stored, int) and not 0 <= stored <= len(data):
            raise DataError(f"damaged (stores an object under the number {stored})")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        """Return the stand-in for a global. Raises DataError if CIFAR-10's files do not refer to it."""
        stand_in = STAND_INS.get((module, name))
        if stand_in is None:
            raise DataError(f"refused global {module}.{name}; only numpy arrays of bytes are read")
        return stand_in


class _StandIn:
    """Base class of stand-ins for globals. They have no attributes that a pickle could set."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise DataError("tries to change a global")


class _NdarrayType(_StandIn):
    __slots__ = ()


class _Reconstruct(_StandIn):
    __slots__ = ()

    def __call__(self, kind: object, shape: object, code: object) -> _Array:
        """Return an array without data, as numpy's `_reconstruct` does; the data follow in its state."""
        return _Array()


class _MakeDtype(_StandIn):
    __slots__ = ()

    def __call__(self, code: object, align: object = False, copy: object = True) -> _Dtype:
        """Return a data type, as `numpy.dtype` does."""
        return _Dtype(code)


class _Encode(_StandIn):
    __slots__ = ()

    def __call__(self, text: object, encoding: object = "latin1") -> bytes:
        """Encode bytes that were written as text, as `_codecs.encode` does; Python 3 uses it in old protocols."""
        if not isinstance(text, str) or encoding != "latin1":
            raise DataError("expected bytes written as latin1 text")
        return text.encode("latin1")


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: object) -> None:
        self.code = _text(code)

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which have no meaning for single bytes."""


class _Array:
    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self, name: str) -> np.ndarray:
        """Build the array from (version, shape, dtype, Fortran order, bytes)."""
        match self.state:
            case (int(), tuple(shape), _Dtype(code=code), bool() | int() as fortran, bytes(raw)):
                sizes_fit = all(isinstance(size, int) and size >= 0 for size in shape)
                if code in UNSIGNED_BYTES and not fortran and sizes_fit and math.prod(shape) == len(raw):
                    return np.frombuffer(raw, np.uint8).reshape(shape)
        raise DataError(f"{name}: expected an array of bytes in C order with as many bytes as its shape says")


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


# Old and new module names of numpy.
STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _NdarrayType(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
}
