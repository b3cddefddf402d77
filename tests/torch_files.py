"""Results as BackdoorBench writes them, and pickles and archives put together piece by piece."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

ROOT = "archive"


# Honest results.


def split(indices: list[int], total: int, **changes: Any) -> dict[str, Any]:
    """The state of a `prepro_cls_DatasetBD_v2`, as BackdoorBench stores it."""
    flags = np.zeros(total)
    flags[indices] = 1
    stored = {
        np.int64(i): {"path": f"/home/author/record/x/bd/1/{i}.png", "other_info": [0, 1]} for i in indices
    }
    container = {"save_folder_path": "/home/author/x", "data_dict": stored, "save_file_format": ".png"}
    return {
        "bd_data_container": container,
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(total),
        "poison_indicator": flags,
        "save_folder_path": "/home/author/x",
        **changes,
    }


def result(**changes: Any) -> dict[str, Any]:
    """A small, valid `attack_result.pt`."""
    weights = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), steps=torch.tensor(7))
    values = {
        "model_name": "preactresnet18",
        "num_classes": 2,
        "model": weights,
        "data_path": "./data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": split([2, 5], 9),
        "bd_test": split([0, 3], 4),
    }
    return {**values, **changes}


def saved(value: object, *, old: bool = False) -> bytes:
    """What `torch.save` writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def archive(pickled: bytes, members: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """An archive like those of `torch.save`, with any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, content in {
            "data.pkl": pickled,
            "byteorder": b"little",
            "version": b"3\n",
            **(members or {}),
        }.items():
            file.writestr(f"{ROOT}/{name}", content)
    return buffer.getvalue()


def old_form(pickled: bytes, keys: list[Any], rest: bytes = b"", **head: Any) -> bytes:
    """A file of the form before PyTorch 1.6, with any pickle."""
    values = {"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "little_endian": True, **head}
    system = {"protocol_version": 1001, "little_endian": values["little_endian"], "type_sizes": {}}
    parts = [pickle.dumps(value, 2) for value in (values["magic"], values["protocol"], system)]
    return b"".join([*parts, pickled, pickle.dumps(keys, 2), rest])


# Pickles, operation by operation.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    digits = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + function.encode() + b"\n(" + b"".join(arguments) + b"tR"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def tensor(
    size: bytes, stride: bytes, *, offset: int = 0, count: int = 6, key: str = "0", kind: str = "FloatStorage"
) -> bytes:
    """The operations that make a tensor."""
    storage = (
        b"("
        + text("storage")
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(offset)
        + size
        + stride
        + b"\x89"
        + hooks
        + b"tR"
    )


def pair(one: int, other: int) -> bytes:
    return number(one) + number(other) + b"\x86"


def single(value: int) -> bytes:
    return number(value) + b"\x85"


STORAGE = {"data/0": np.arange(6, dtype=np.float32).tobytes()}


def state(*tensors: bytes) -> bytes:
    items = b"".join(text(f"w{i}") + each for i, each in enumerate(tensors))
    return program(b"}(" + text("model") + b"}(" + items + b"uu")


class Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call
