"""Values that training scripts save beside a state dict: which are dropped, and that none of their code is run."""

from __future__ import annotations

import collections
import datetime
import io
import pickle
import random
import resource
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from hostile_weights import GOOD, calling, legacy, saved, with_pickle
from torchvision.transforms import InterpolationMode

from backdoorbench_moe.engine.weights.reading import read_weights
from backdoorbench_moe.errors import RecordError

DROPPED = {
    "scores": {
        "acc": np.float64(93.1),
        "epoch": np.int64(3),
        "best": np.bool_(True),
        "half": np.float16(0.5),
    },
    "complex": (1j, np.complex64(2j)),
    "texts": [np.str_("deer"), np.bytes_(b"deer"), np.str_("")],
    "by class": {np.int64(3): 0.5},
    "arrays": [
        np.arange(5.0),
        np.ones((3, 2)).T,
        np.zeros(0),
        np.array(["cat", "deer"]),
        np.arange(3, dtype=">i4"),
    ],
    "array type": np.dtype("float32"),
    "numpy's generator": np.random.RandomState(0).get_state(),
    "torch's generator": torch.get_rng_state(),
    "best tensor": torch.tensor(93.1),
    "bytes": [b"a\xff", b""],
    "counts": collections.defaultdict(int, a=1),
    "losses": collections.deque([0.3, 0.2], maxlen=10),
    "sets": [{1, 2}, frozenset({1}), {frozenset({1})}, range(3)],
    "dates": [
        datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),  # noqa: UP017
        datetime.date(2024, 5, 1),
        datetime.timedelta(seconds=20),
    ],
    "types": [int, str, torch.float32, torch.complex64, torch.float8_e4m3fn],
    "size": torch.Size([2, 3]),
    "device": torch.device("cuda:0"),
    "version": torch.torch_version.TorchVersion("2.11.0"),
    "interpolation": InterpolationMode.BICUBIC,
}


def old_numpy(file: bytes) -> bytes:
    """The same file with the names of numpy 1 instead of numpy 2, and the arguments of its first versions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in data and b"\x89\x88\x87" in data
                data = data.replace(b"cnumpy._core.", b"cnumpy.core.").replace(
                    b"\x89\x88\x87", b"K\x00K\x01\x87"
                )
            new.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("write", [saved, legacy])
def test_a_value_beside_the_state_dict_is_dropped(name, write, tmp_path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(write({"state_dict": GOOD, "x": DROPPED[name]}))
    found = read_weights(file)
    assert found.tensors.keys() == GOOD.keys()
    assert all(torch.equal(found.tensors[key], GOOD[key]) for key in GOOD)
    assert found.notes == ("the state dict is under the key 'state_dict'; not read: x",)


def test_numbers_of_numpy_1_and_2_are_dropped_without_numpys_functions(tmp_path, monkeypatch) -> None:
    content = saved({"state_dict": GOOD, "acc": np.float64(93.1), "np": np.arange(3), np.int64(3): 0})
    monkeypatch.setattr(np, "dtype", None)
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        monkeypatch.setitem(sys.modules, module, None)
    for written in (content, old_numpy(content)):
        (tmp_path / "w.pth").write_bytes(written)
        [note] = read_weights(tmp_path / "w.pth").notes
        assert note.endswith("not read: acc, np, a value that is not read")


def test_a_value_of_numpy_among_the_tensors_is_an_error(tmp_path) -> None:
    (tmp_path / "w.pth").write_bytes(saved({**GOOD, "mean": np.float64(0.5)}))
    with pytest.raises(RecordError, match="mean: expected a tensor, got NumpyNumber"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_newer_protocol_is_named(protocol, tmp_path) -> None:
    (tmp_path / "w.pth").write_bytes(saved({**GOOD, "acc": np.float64(1)}, pickle_protocol=protocol))
    with pytest.raises(RecordError, match=r"expected pickle protocol 2, the default of torch\.save, got an"):
        read_weights(tmp_path / "w.pth")


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        function, *arguments = self.call
        return function, tuple(arguments)  # type: ignore[return-value]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def encoded(*arguments: bytes) -> bytes:
    return calling("_codecs", "encode", *arguments)[2:-1]


SCALAR = "numpy.core.multiarray"
F8 = calling("numpy", "dtype", text("f8"), b"\x89", b"\x88")[2:-1]
EIGHT = encoded(text("a" * 8), text("latin1"))
# Distinct numbers, made once: a list, and a dict with a tuple of itself in the memo.
NUMBERS = b"](" + b"".join(b"M" + struct.pack("<H", n) for n in range(50_000)) + b"e"
NAMES = b"}(" + b"".join(text(f"{n:x}") + b"N" for n in range(50_000)) + b"u"


def copies(module: str, name: str) -> bytes:
    """Copy a list of 50,000 numbers again and again, in five bytes each."""
    function = f"c{module}\n{name}\n".encode()
    return b"\x80\x02](" + NUMBERS + b"\x85q\x01" + function + b"q\x02" + b"h\x02h\x01R" * 10_000 + b"e."


def attributes(module: str, name: str, state: bytes) -> bytes:
    """Give a dict of 50,000 attributes to many objects."""
    function = f"c{module}\n{name}\n".encode()
    return b"\x80\x02](" + state + b"q\x01" + function + b"q\x02" + b"h\x02)Rh\x01b" * 10_000 + b"e."


HOSTILE = {
    "a type of objects": (
        saved({"state_dict": GOOD, "x": np.array([{}], object)}),
        "expected a numpy type of numbers or texts, got 'O8'",
    ),
    "a type of records": (
        saved({"state_dict": GOOD, "x": np.zeros(2, [("a", "i4")])}),
        "expected a numpy type of numbers or texts, got 'V4'",
    ),
    "a type of dates": (
        saved({"state_dict": GOOD, "x": np.datetime64("2024-05-01")}),
        "expected a numpy type of numbers or texts, got 'M8'",
    ),
    "a type that is a long text": (
        calling("numpy", "dtype", text("f" * 1000), b"\x89", b"\x88"),
        r"expected a numpy type of numbers or texts, got 'f+\.\.\.'$",
    ),
    "a type of types": (
        calling("numpy", "dtype", b"cnumpy\ndtype\n", b"\x89", b"\x88"),
        "expected a numpy type",
    ),
    "a type without arguments": (calling("numpy", "dtype"), "expected a numpy type"),
    "a number of no type": (calling(SCALAR, "scalar", text("f8"), EIGHT), "expected a numpy number"),
    "a number of another size": (
        calling(SCALAR, "scalar", F8, encoded(text("a"), text("latin1"))),
        "expected a numpy number with as many bytes as its type says",
    ),
    "a number of a text": (calling(SCALAR, "scalar", F8, text("a" * 8)), "expected a numpy number"),
    "a number of numbers": (
        calling(SCALAR, "scalar", F8, calling(SCALAR, "scalar", F8, EIGHT)[2:-1]),
        "expected a numpy number",
    ),
    "a number without arguments": (calling(SCALAR, "scalar"), "expected a numpy number"),
    "an array of objects as its state": (
        b"\x80\x02" + calling(SCALAR, "_reconstruct")[2:-1] + b"(K\x01)" + F8 + b"\x89]tb.",
        "expected a numpy array of numbers or texts",
    ),
    "another function of numpy": (
        calling(SCALAR, "frombuffer", EIGHT),
        r"contains numpy\.core\.multiarray\.frombuffer, not only tensors",
    ),
    "another function of numpy's newer module": (
        calling("numpy._core.multiarray", "_vec_string", EIGHT),
        r"contains numpy\._core\.multiarray\._vec_string, not only tensors",
    ),
    "another function of _codecs": (
        calling("_codecs", "lookup", text("latin1")),
        r"contains _codecs\.lookup, not only tensors",
    ),
    "another encoding": (
        calling("_codecs", "encode", text("a" * 100_000), text("punycode")),
        r"calls _codecs\.encode with something else than a text and latin1",
    ),
    "an encoding that compresses": (
        calling("_codecs", "encode", EIGHT, text("zlib")),
        "something else than a text",
    ),
    "a handler of errors": (
        calling("_codecs", "encode", text("\u0100"), text("latin1"), text("xmlcharrefreplace")),
        "something else than a text and latin1",
    ),
    "the default encoding": (
        calling("_codecs", "encode", text("a")),
        "something else than a text and latin1",
    ),
    "nested calls": (
        calling("_codecs", "encode", EIGHT, text("latin1")),
        "something else than a text and latin1",
    ),
    "arguments that are a list": (
        b"\x80\x02c_codecs\nencode\n](" + text("a") + text("idna") + b"eR.",
        "is not a valid pickle: a call of something else than a function, or with something else than a tuple",
    ),
    "a call of an object": (
        b"\x80\x02" + calling("builtins", "set")[2:-1] + b")R.",
        "is not a valid pickle: a call of something else than a function",
    ),
    "a text with larger characters": (
        calling("_codecs", "encode", text("\u0100"), text("latin1")),
        "contains bytes that are written with larger numbers than 255",
    ),
    "a text that is encoded again and again": (
        b"\x80\x02]("
        + b"c_codecs\nencode\nq\x01"
        + text("a" * 1_000_000)
        + text("latin1")
        + b"\x86q\x02"
        + b"h\x01h\x02R" * 10_000
        + b"e.",
        "makes more than 16,777,216 bytes",
    ),
    "the function under another number": (
        b"\x80\x02](c_codecs\nencode\nr\x00\x01\x00\x00" + text("a") + text("idna") + b"\x86Re.",
        "something else than a text and latin1",
    ),
    "a list that is copied into sets": (copies("__builtin__", "set"), "copies more than 500,000 values"),
    "a list that is copied into sizes": (copies("torch", "Size"), "copies more than 500,000 values"),
    "a list that is counted": (copies("collections", "Counter"), "copies more than 500,000 values"),
    "attributes of many objects": (
        attributes("collections", "OrderedDict", NAMES),
        "copies more than 500,000 values",
    ),
    "attributes in a pair": (
        attributes("collections", "Counter", NAMES + b"N\x86"),
        "copies more than 500,000 values",
    ),
    "a set of a tensor": (
        saved({"state_dict": GOOD, "x": Calls(set, torch.zeros(1).expand(10_000))}),
        "makes __builtin__.set of an object that may be of any size",
    ),
    "a bytearray of a terabyte": (
        calling("__builtin__", "bytearray", pickle.dumps(1 << 40, 2)[2:-1]),
        "contains __builtin__.bytearray, not only tensors",
    ),
    "bytes of a terabyte": (
        calling("__builtin__", "bytes", pickle.dumps(1 << 40, 2)[2:-1]),
        "expected a dict of tensors, got bytes",
    ),
    "a range of a terabyte": (
        calling("__builtin__", "xrange", pickle.dumps(1 << 40, 2)[2:-1]),
        "expected a dict of tensors, got Unread",
    ),
    "a storage whose key is a large tuple": (
        b"\x80\x02("
        + text("storage")
        + b"ctorch\nFloatStorage\n("
        + text("a" * 1_000_000)
        + b"q\x01"
        + b"h\x01" * 1_000
        + b"t"
        + text("cpu")
        + b"K\x06tQ.",
        "is not a valid pickle: a reference to something else than a storage",
    ),
    "a key that is a large tuple": (
        b"\x80\x02}(" + text("a" * 1_000_000) + b"q\x01N(" + b"h\x01" * 1_000 + b"t}u.",
        r"got a+\.\.\., a tuple$",
    ),
    "a large dict under many keys": (
        b"\x80\x02}(K\x00"
        + NAMES
        + b"q\x01"
        + b"".join(text(f"{n}") + b"h\x01" for n in range(1_000))
        + b"u.",
        "got 0, 0, 1, 2, 3, 4, 5, 6, 7, 8$",
    ),
    "a module that is refused": (
        saved({"state_dict": GOOD, "x": np.random.default_rng(0)}),
        r"contains numpy\.random\._pickle\.__\w+, not only tensors",
    ),
    "an instruction that torch does not read": (
        b"\x80\x02N0N.",
        r"an instruction that no state dict has \(POP\)",
    ),
    "an unused value of the memo": (
        b"\x80\x02h\x07.",
        "is not a valid pickle: an instruction takes the value 7",
    ),
    "items of a number": (
        b"\x80\x02K\x01K\x02a.",
        "is not a valid pickle: an instruction adds items to a number",
    ),
    "items of a list": (
        b"\x80\x02]K\x01K\x02s.",
        "cannot be read as a state dict: Can only SETITEM for dict",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_value_is_refused_in_one_line(case, tmp_path) -> None:
    content, reason = HOSTILE[case]
    file = tmp_path / "w.pth"
    file.write_bytes(content if content.startswith(b"PK") else with_pickle(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=reason) as caught:
        read_weights(file)
    text = str(caught.value)
    assert text.startswith(f"weights {file}: ") and text.isprintable() and "weights_only" not in text
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 200 << 20


def test_pythons_own_random_state_is_dropped(tmp_path) -> None:
    (tmp_path / "w.pth").write_bytes(saved({"state_dict": GOOD, "random": random.getstate()}))
    assert read_weights(tmp_path / "w.pth").tensors.keys() == GOOD.keys()


@pytest.mark.parametrize("write", [saved, legacy])
def test_a_tensor_beside_the_state_dict_does_not_hide_it(write, tmp_path) -> None:
    """PyTorch's example for ImageNet saves the best accuracy as a tensor."""
    (tmp_path / "w.pth").write_bytes(write({"epoch": 3, "state_dict": GOOD, "best_acc1": torch.tensor(76.1)}))
    found = read_weights(tmp_path / "w.pth")
    assert found.tensors.keys() == GOOD.keys()
    assert found.notes == ("the state dict is under the key 'state_dict'; not read: epoch, best_acc1",)
