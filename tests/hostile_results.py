"""Files with values that cannot be: results, safetensors, and what is no file of torch."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib

import numpy as np
import torch
from hostile import TOUCH, hostile
from torch_files import (
    Calls,
    result,
    saved,
    split,
    text,
)

# No files of torch at all.
hostile("an empty file", "attack", "expected a file of 1 to", b"")
hostile("a text", "attack", "expected a file of torch.save", b"import os; os.system('touch canary')\n")
hostile("an image", "attack", "expected a file of torch.save", b"\x89PNG\r\n\x1a\n" + bytes(100))
hostile(
    "a sparse file of 5 GiB",
    "attack",
    "expected a file of 1 to",
    lambda path: (path.touch(), os.truncate(path, 5 << 30)),
)
hostile("a folder", "attack", "got a folder", lambda path: path.mkdir())
hostile("a pipe", "attack", "got a pipe", lambda path: os.mkfifo(path))
hostile(
    "a link to nowhere", "attack", "a link that leads to no file", lambda path: path.symlink_to("nowhere")
)
hostile("a link to itself", "attack", "a link that leads to no file", lambda path: path.symlink_to(path.name))
hostile("nothing", "attack", "not found", lambda path: None)

# Results with values that cannot be.
for name, reason, changes in (
    ("NaN weights", "model: w: holds NaN", {"model": {"w": torch.tensor([1.0, float("nan")])}}),
    ("infinite weights", "model: w: holds NaN", {"model": {"w": torch.tensor([float("inf")])}}),
    ("weights that are texts", "model: 'w': expected a tensor", {"model": {"w": "text"}}),
    ("weights by number", "model: 3: expected a tensor", {"model": {3: torch.zeros(1)}}),
    ("no weights", "model: expected a state dict with tensors", {"model": {}}),
    ("a list as model", "model: expected a state dict", {"model": []}),
    ("2**40 classes", "num_classes: expected 2 to", {"num_classes": 1 << 40}),
    ("True classes", "num_classes: expected", {"num_classes": True}),
    ("an empty model name", "model_name: expected a name", {"model_name": ""}),
    (
        "a model name with control characters",
        "model_name: expected a name",
        {"model_name": "\x1b[2Jresnet18"},
    ),
    ("a data set named by bytes", "clean_data: expected a name", {"clean_data": 5}),
    ("images of 10**9 pixels", "img_size: expected", {"img_size": (10**9, 32, 3)}),
    ("images of two sides", "img_size: expected 3 values", {"img_size": (32, 32)}),
    ("no test images", "bd_test: expected", {"bd_test": None}),
    (
        "an index outside",
        "original_index_array: expected places",
        {"bd_test": split([0], 4, original_index_array=np.array([9]))},
    ),
    (
        "a negative index",
        "original_index_array: expected places",
        {"bd_test": split([0], 4, original_index_array=np.array([-1]))},
    ),
    (
        "an indicator of 2",
        "poison_indicator: expected",
        {"bd_test": split([0], 4, poison_indicator=np.full(4, 2.0))},
    ),
    (
        "an indicator of NaN",
        "poison_indicator: expected",
        {"bd_test": split([0], 4, poison_indicator=np.full(4, np.nan))},
    ),
    (
        "an image that is not stored",
        "bd_test: image 3",
        {"bd_test": split([0], 4, poison_indicator=np.array([1.0, 0, 0, 1]))},
    ),
):
    hostile(name, "attack", reason, saved(result(**changes)))
bad_label = split([0], 4)
bad_label["bd_data_container"]["data_dict"][np.int64(0)]["other_info"] = [-1, 1 << 70]
hostile("a label of 2**70", "attack", "bd_test: image 0", saved(result(bd_test=bad_label)))
hostile("a poison list of texts", "poison list", "expected an array of 0 and 1", saved("0 1 0 1"))
hostile("settings that are no dict", "info", "expected an info.pickle", saved([1, 2]))
hostile(
    "a defense result without a model",
    "defense",
    "model is missing",
    saved({"model_name": "x", "num_classes": 2}),
)


# Safetensors: a header of JSON, behind its length, and then the numbers.
def safetensors(header: object, numbers: bytes = b"", *, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + numbers


def entry(shape: list[int], offsets: tuple[int, int], kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}


for name, content in {
    "a header of gigabytes": safetensors({}, length=8 << 30),
    "a header of 2**63 bytes": safetensors({}, length=1 << 63),
    "a header that is no JSON": safetensors(b"{'a': __import__('os')}"),
    "a nested header": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "numbers that are not there": safetensors({"w": entry([1000], (0, 4000))}),
    "numbers that overlap": safetensors({"v": entry([2], (0, 8)), "w": entry([2], (4, 12))}, bytes(12)),
    "numbers with a gap": safetensors({"v": entry([1], (0, 4)), "w": entry([1], (8, 12))}, bytes(12)),
    "a shape of 2**80 numbers": safetensors({"w": entry([1 << 40, 1 << 40], (0, 4))}, bytes(4)),
    "a negative shape in JSON": safetensors({"w": entry([-1], (0, 4))}, bytes(4)),
    "an unknown type of numbers": safetensors({"w": entry([1], (0, 4), "OBJECT")}, bytes(4)),
    "offsets that go back": safetensors({"w": entry([1], (4, 0))}, bytes(4)),
    "numbers behind the last": safetensors({"w": entry([1], (0, 4))}, bytes(400)),
    "a safetensors file cut off": safetensors({"w": entry([1], (0, 4))})[:-3],
    "an empty safetensors file": b"",
    "a pickle as safetensors": pickle.dumps(Calls(os.system, TOUCH)),
}.items():
    hostile(name, "safetensors", "expected a safetensors file", content)

# Pickles of CIFAR-10's form.
for name, content in {
    "a batch that runs something": pickle.dumps({"data": Calls(os.system, TOUCH)}),
    "a batch in itself": b"\x80\x02}q\x00" + text("data") + b"h\x00sN",
    "a batch of floats": pickle.dumps({"data": np.zeros(3)}),
    "a compressed batch": zlib.compress(bytes(100)),
}.items():
    hostile(name, "CIFAR-10", "refused|damaged|expected", content)
