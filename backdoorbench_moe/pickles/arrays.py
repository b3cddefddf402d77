"""Replacements for numpy's globals in pickles: arrays and numbers of fixed types, read from the bytes in the file."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles.machine import Global, Stateful

# Booleans, integers and floats; no objects, strings, records or dates.
CODE = re.compile(r"[<>|=]?([biuf][1248])")
MOST_AXES = 8


class _Dtype(Stateful):
    """A type of numbers."""

    def __init__(self, code: str) -> None:
        found = CODE.fullmatch({"bool": "b1", "uint8": "u1"}.get(code, code))
        if found is None or found[1] in ("f1", "b2", "b4", "b8"):
            raise DataError(f"refused numpy type {code[:40]!r}; only numbers are read")
        self.code, self.order = found[1], "<"

    def set_state(self, state: object) -> None:
        """Accept (version, byte order, no sub-type, no names, no fields, ...)."""
        match state:
            case (int(), str() | bytes() as order, None, None, None, int(), int(), *_):
                text = _as_text(order)
                if text in ("<", ">", "|", "="):
                    self.order = ">" if text == ">" else "<"
                    return
        raise DataError("expected a numpy type of numbers")

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class PickledArray(Stateful):
    """An array, whose values are set by its state."""

    def __init__(self) -> None:
        self._values: np.ndarray | None = None

    def set_state(self, state: object) -> None:
        """Accept (version, shape, dtype, Fortran order, bytes)."""
        match state:
            case (int(), tuple(shape), _Dtype() as kind, bool() | int() as fortran, bytes(raw)):
                sizes_fit = len(shape) <= MOST_AXES and all(type(size) is int and size >= 0 for size in shape)
                if not kind.dtype.isnative:
                    raise DataError("refused numbers of the other byte order, which would have to be copied")
                if not fortran and sizes_fit and math.prod(shape) * kind.dtype.itemsize == len(raw):
                    self._values = np.frombuffer(raw, kind.dtype).reshape(shape)
                    return
                raise DataError("expected an array in C order with as many bytes as its shape says")
        raise DataError("expected an array of numbers in C order")

    @property
    def complete(self) -> bool:
        """Whether the array has its values."""
        return self._values is not None

    @property
    def values(self) -> np.ndarray:
        """The array. Use it after `structure.check_structure`."""
        assert self._values is not None
        return self._values


def _dtype(arguments: tuple[Any, ...]) -> _Dtype:
    match arguments:
        case (str() | bytes() as code, *_):
            return _Dtype(_as_text(code))
    raise DataError("expected the code of a numpy type")


def _reconstruct(arguments: tuple[Any, ...]) -> PickledArray:
    """Return an array without values; the requested shape is ignored."""
    if len(arguments) != 3 or arguments[0] is not NDARRAY:
        raise DataError("expected a numpy array")
    return PickledArray()


def _scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    match arguments:
        case (_Dtype(dtype=dtype), bytes(raw)) if len(raw) == dtype.itemsize:
            value: int | float | bool = np.frombuffer(raw, dtype)[0].item()
            return value
    raise DataError("expected a number with as many bytes as its type says")


def _encode(arguments: tuple[Any, ...]) -> bytes:
    """Return bytes that were written as text, as in protocols 0 to 2."""
    match arguments:
        case (str(text), "latin1" | b"latin1"):
            try:
                return text.encode("latin1")
            except UnicodeEncodeError:
                pass
    raise DataError("expected bytes written as latin1 text")


def _as_text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


NDARRAY = Global("numpy.ndarray")
# Old and new module names of numpy.
NUMPY: dict[tuple[str, str], Global] = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): Global("numpy.dtype", _dtype),
    ("_codecs", "encode"): Global("_codecs.encode", _encode),
    **{
        (module, name): Global(f"{module}.{name}", call)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, call in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
}
