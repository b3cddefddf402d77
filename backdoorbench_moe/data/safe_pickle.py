"""Reading the pickle files of CIFAR-10 as data, without unpickling."""

from __future__ import annotations

from typing import Any

import numpy as np

from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles import NUMPY, Limits, PickledArray, check_structure, read_value

ONLY = "numpy arrays of numbers"


def read_pickle(data: bytes, name: str) -> dict[str, Any]:
    """Read a pickle file of CIFAR-10 or CIFAR-100: a dict of strings, numbers, lists and arrays.

    Nothing in the file is imported or called; see `pickles.read_value`.

    Args:
        data: Content of the file.
        name: Name of the file, for error messages.

    Returns:
        The dict, with strings as keys. Values that are strings written by Python 2 are returned as bytes.

    Raises:
        DataError: The file is damaged, has other content, or refers to a disallowed global, which the message names.
    """
    try:
        content, _ = read_value(data, NUMPY, only=ONLY, limits=Limits(nbytes=1 << 30))
        check_structure([content], Limits().depth)
        if not isinstance(content, dict):
            raise DataError(f"expected a dict, got {type(content).__name__}")
        if not all(isinstance(key, str | bytes) for key in content):
            raise DataError("expected a dict with texts as keys")
        return {_text(key): _plain(value) for key, value in content.items()}
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _plain(value: object) -> object:
    if not isinstance(value, PickledArray):
        return value
    if value.values.dtype != np.uint8:
        raise DataError(f"expected an array of bytes, got {value.values.dtype}")
    return value.values


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value
