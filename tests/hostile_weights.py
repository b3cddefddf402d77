"""Files of weights that a reader must refuse, each made by a function of the folder that it is written to."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

CODE_RAN = "code_ran"
GOOD = {"a": torch.ones(2, 3), "b": torch.zeros(4)}


class Runs:
    """An object whose unpickling writes a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder / CODE_RAN),)


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def saved(content: object, **options: object) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: object) -> bytes:
    """What `torch.save` wrote before version 1.6."""
    return saved(content, _use_new_zipfile_serialization=False)


def rezipped(
    change: Callable[[str, bytes], tuple[str, bytes] | None],
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> bytes:
    """A zip file of torch whose members were changed, left out (None) or added to."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(GOOD))) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            if (member := change(name, old.read(name))) is not None:
                new.writestr(*member)
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    """A zip file of torch with another pickle in it."""
    return rezipped(lambda name, old: (name, data if name.endswith("data.pkl") else old))


def calling(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls a function: PROTO 2, GLOBAL, MARK, arguments, TUPLE, REDUCE, STOP."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR."


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0) -> bytes:
    """The pickle of one tensor of a storage, as torch.save writes it, with any sizes."""

    storage = object()

    class Stub(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is storage else None

    class Tensor:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    buffer = io.BytesIO()
    Stub(buffer, protocol=2).dump({"a": Tensor()})
    return buffer.getvalue()


def _legacy_number(value: int) -> bytes:
    return legacy({**GOOD, "n": value})


def _int(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def self_referring() -> bytes:
    """A state dict that contains itself."""
    content: dict[str, object] = {}
    content["state_dict"] = content
    return saved(content)


def nested_tuples(levels: int) -> bytes:
    """A pickle of a dict whose keys and values are tuples, each of the previous one twice: 2**levels values."""
    twice = b"h\x01h\x01\x86q\x01"
    return b"\x80\x02}(K\x01\x85q\x01" + twice * levels + b"u."


HOSTILE: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    # safetensors
    "header of gigabytes": ("a.safetensors", lambda f: safetensors({}, length=1 << 40)),
    "header of 2**63 bytes": ("a.safetensors", lambda f: safetensors({}, length=(1 << 63) + 1)),
    "header longer than the file": ("a.safetensors", lambda f: safetensors({}, length=100)),
    "header that is no JSON": ("a.safetensors", lambda f: safetensors(b'{"a": oops}')),
    "header nested deeply": (
        "a.safetensors",
        lambda f: safetensors(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    ),
    "header that is no UTF-8": ("a.safetensors", lambda f: safetensors(b'{"\xff\xfe": 1}')),
    "no tensors": ("a.safetensors", lambda f: safetensors({"__metadata__": {"a": "b"}})),
    "overlap": (
        "a.safetensors",
        lambda f: safetensors({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, bytes(24)),
    ),
    "outside of the file": ("a.safetensors", lambda f: safetensors({"a": entry(0, 4000, [1000])}, bytes(16))),
    "negative offset": ("a.safetensors", lambda f: safetensors({"a": entry(-16, 0, [4])}, bytes(16))),
    "offsets reversed": ("a.safetensors", lambda f: safetensors({"a": entry(16, 0, [4])}, bytes(16))),
    "shape beyond the data": ("a.safetensors", lambda f: safetensors({"a": entry(0, 16, [1000])}, bytes(16))),
    "shape that overflows": (
        "a.safetensors",
        lambda f: safetensors({"a": entry(0, 16, [1 << 62, 1 << 62])}, bytes(16)),
    ),
    "unknown type": ("a.safetensors", lambda f: safetensors({"a": entry(0, 16, [4], "F99")}, bytes(16))),
    "bytes behind the data": ("a.safetensors", lambda f: safetensors({"a": entry(0, 16, [4])}, bytes(99))),
    "hole in the data": ("a.safetensors", lambda f: safetensors({"a": entry(8, 24, [4])}, bytes(24))),
    "cut short": ("a.safetensors", lambda f: safetensors({"a": entry(0, 16, [4])}, bytes(7))),
    # torch's zip format
    "object that runs code": ("a.pt", lambda f: saved({"a": Runs(f)})),
    "object that runs code beside tensors": ("a.pt", lambda f: saved({**GOOD, "x": Runs(f)})),
    "pickled module": ("a.pth", lambda f: saved(torch.nn.Linear(2, 2))),
    "os.system": ("a.pt", lambda f: with_pickle(calling("os", "system", b"X\x04\x00\x00\x00true"))),
    "eval": ("a.pt", lambda f: with_pickle(calling("builtins", "eval", b"X\x01\x00\x00\x001"))),
    "torch.load inside": ("a.pt", lambda f: with_pickle(calling("torch", "load", b"X\x01\x00\x00\x00a"))),
    "bytearray of a terabyte": (
        "a.pt",
        lambda f: with_pickle(calling("builtins", "bytearray", _int(1 << 40))),
    ),
    "a newer protocol": ("a.pt", lambda f: saved(GOOD, pickle_protocol=4)),
    "name with a newline": ("a.pt", lambda f: saved({"a\nb": 3, "c": torch.ones(1)})),
    "sparse tensor": ("a.pt", lambda f: saved({"a": torch.eye(3).to_sparse()})),
    "quantised tensor": (
        "a.pt",
        lambda f: saved({"a": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)}),
    ),
    "meta tensor": ("a.pt", lambda f: saved({"a": torch.ones(3, device="meta")})),
    "storage larger than its member": (
        "a.pt",
        lambda f: with_pickle(tensor_pickle((1 << 30,), (1,), 1 << 30)),
    ),
    "tensor outside of its storage": ("a.pt", lambda f: with_pickle(tensor_pickle((4,), (1,), 6, offset=5))),
    "expanded tensor": ("a.pt", lambda f: with_pickle(tensor_pickle((1 << 20, 1 << 20), (0, 0), 6))),
    "compressed bomb": (
        "a.pt",
        lambda f: rezipped(lambda n, d: (n, d), zipfile.ZIP_DEFLATED, {"archive/data/9": bytes(50_000_000)}),
    ),
    "member that leaves its folder": (
        "a.pt",
        lambda f: rezipped(lambda n, d: (n, d), extra={"../outside": b"x"}),
    ),
    "member with an absolute path": ("a.pt", lambda f: rezipped(lambda n, d: (n, d), extra={"/tmp/x": b"x"})),
    "no pickle": ("a.pt", lambda f: rezipped(lambda n, d: None if n.endswith("data.pkl") else (n, d))),
    "two pickles": ("a.pt", lambda f: rezipped(lambda n, d: (n, d), extra={"other/data.pkl": b"\x80\x02}."})),
    "missing storage": ("a.pt", lambda f: rezipped(lambda n, d: None if n.endswith("data/0") else (n, d))),
    "pickle cut short": ("a.pt", lambda f: with_pickle(tensor_pickle((2,), (1,), 6)[:-20])),
    "pickle of nothing": ("a.pt", lambda f: with_pickle(b"")),
    "pickle of rubbish": ("a.pt", lambda f: with_pickle(b"\xff" * 1000)),
    "too many instructions": ("a.pt", lambda f: with_pickle(b"\x80\x02]" + b"(e" * 300_000 + b".")),
    "tuples that take forever to hash": ("a.pt", lambda f: with_pickle(nested_tuples(101))),
    "zip cut short": ("a.pt", lambda f: saved(GOOD)[:-30]),
    "numpy's zip": ("a.npz", lambda f: rezipped(lambda n, d: None, extra={"a.npy": b"x"})),
    "dict that contains itself": ("a.pt", lambda f: self_referring()),
    "nested deeply": ("a.pt", lambda f: with_pickle(b"\x80\x02" + b"](" * 20_000 + b"e" * 20_000 + b".")),
    "list": ("a.pt", lambda f: saved([torch.ones(2)])),
    "one tensor": ("a.pt", lambda f: saved(torch.ones(2))),
    "empty dict": ("a.pt", lambda f: saved({})),
    "text among the tensors": ("a.pt", lambda f: saved({**GOOD, "x": "text"})),
    "dict among the tensors": ("a.pt", lambda f: saved({**GOOD, "x": {"y": torch.ones(1)}})),
    "numbers as names": ("a.pt", lambda f: saved({0: torch.ones(1)})),
    "two state dicts": ("a.pt", lambda f: saved({"model": GOOD, "state_dict": GOOD})),
    "state dict under another key": ("a.pt", lambda f: saved({"teacher": GOOD, "epoch": 3})),
    # torch's old format
    "old: object that runs code": ("a.pth", lambda f: legacy({"a": Runs(f)})),
    "old: pickle that runs code": ("a.pth", lambda f: pickle.dumps(Runs(f), 2)),
    "old: newer protocol that runs code": ("a.pth", lambda f: pickle.dumps(Runs(f), 4)),
    "old: storage of a terabyte": ("a.pth", lambda f: legacy(GOOD).replace(b"K\x06", b"J\xff\xff\xff\x7f")),
    "old: a number larger than the file": ("a.pth", lambda f: _legacy_number(1 << 70)),
    "old: tuples that take forever to hash": (
        "a.pth",
        lambda f: (
            b"".join(pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {})) + nested_tuples(101)
        ),
    ),
    "old: cut short": ("a.pth", lambda f: legacy(GOOD)[:-10]),
    "old: line without end": ("a.pth", lambda f: b"\x80\x02c" + b"a" * 20_000_000),
    # neither
    "empty": ("a.safetensors", lambda f: b""),
    "text": ("a.txt", lambda f: b"weights"),
    "text called safetensors": ("a.safetensors", lambda f: b"weights, really"),
    "text called pt": ("a.pt", lambda f: b"weights, really"),
    "zip called safetensors": ("a.safetensors", lambda f: saved(GOOD)),
    "safetensors called pt": ("a.pt", lambda f: safetensors({"a": entry(0, 16, [4])}, bytes(16))),
}
