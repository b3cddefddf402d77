"""Files that are made to harm whoever reads them.

Every entry of `HOSTILE` writes one file. A pickle that calls something would create the file `CANARY` in the current
folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_files import (
    ROOT,
    STORAGE,
    Calls,
    archive,
    call,
    old_form,
    pair,
    program,
    result,
    saved,
    single,
    split,
    state,
    tensor,
    text,
)

CANARY = "canary"
TOUCH = f"touch {CANARY}"


@dataclass(frozen=True)
class Hostile:
    """A file: who must refuse it, with which reason, and how it is written."""

    reader: str
    reason: str
    write: Callable[[Path], object]


HOSTILE: dict[str, Hostile] = {}


def hostile(name: str, reader: str, reason: str, content: bytes | Callable[[Path], object]) -> None:
    """Add a file: its bytes, or a function that writes it."""
    assert name not in HOSTILE
    write = content if callable(content) else (lambda path: path.write_bytes(content))
    HOSTILE[name] = Hostile(reader, reason, write)


# Globals that are not admitted: first those that run something.
for protocol in (0, 2, 4):
    evil = pickle.dumps({"model": Calls(os.system, TOUCH)}, protocol)
    hostile(f"os.system, protocol {protocol}", "attack", r"refused global posix\.system", archive(evil))
for name in (
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "subprocess.Popen",
    "torch.load",
    "numpy.load",
    "numpy.fromfile",
    "_codecs.open",
    "copyreg._reconstructor",
    "operator.attrgetter",
    "collections.defaultdict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "numpy.dtype.type",
    "torch.nn.modules.linear.Linear",
):
    body = call(name, text(f"__import__('os').system('{TOUCH}')"))
    hostile(name, "attack", rf"refused global {name}".replace(".", r"\."), archive(program(body)))
hostile("a whole module", "attack", r"refused global torch\.nn\.", saved(torch.nn.Linear(2, 2)))
hostile(
    "a PIL image",
    "attack",
    r"refused global PIL\.Image",
    saved(result(bd_test=split([0], 2, x=Image.new("RGB", (2, 2))))),
)
hostile(
    "a half-precision storage",
    "attack",
    r"refused global torch\.HalfStorage",
    saved(result(model={"w": torch.zeros(2).half()})),
)
hostile(
    "an array of objects", "attack", "refused numpy type 'O8'", saved(result(bd_test=np.array([{}], object)))
)
hostile(
    "an array of records",
    "attack",
    "refused numpy type 'V",
    saved(result(bd_test=np.zeros(2, [("a", "i4")]))),
)
hostile("an array of dates", "attack", "refused numpy type 'M8'", saved(result(bd_test=np.zeros(2, "M8[s]"))))
hostile("a set", "attack", r"refused global \w+\.set", saved(result(clean_data={1})))
hostile("a global by number", "attack", "refused global 1.2", archive(program(b"K\x01K\x02\x93")))

# Operations that are not admitted.
for name, body in {
    "INST": b"(" + text(TOUCH) + b"ios\nsystem\n",
    "OBJ": b"(N" + text(TOUCH) + b"o",
    "NEWOBJ": b"ctorch\nFloatStorage\n)\x81",
    "NEWOBJ_EX": b"ctorch\nFloatStorage\n)}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 60),
    "EMPTY_SET": b"\x8f",
    "FROZENSET": b"(\x91",
    "DUP": b"N2",
    "POP": b"N0",
}.items():
    hostile(f"operation {name}", "attack", f"refused operation {name}", archive(program(body)))
hostile("BUILD on a dict", "attack", "refused operation BUILD on dict", archive(program(b"}}b")))
hostile("BUILD on a global", "attack", "tries to change a global", archive(program(b"cnumpy\ndtype\n}b")))
hostile(
    "attributes",
    "attack",
    "refused attributes",
    archive(program(b"ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb")),
)
hostile("a call of a text", "attack", "refused call of str", archive(program(text("print") + b")R")))
hostile(
    "a call of a storage",
    "attack",
    "refused call of torch.FloatStorage",
    archive(program(b"ctorch\nFloatStorage\n)R")),
)
hostile(
    "a foreign reference", "attack", "something else than a storage", archive(program(text("module") + b"Q"))
)
hostile("protocol 200", "attack", "expected a pickle of protocol 0 to 5, got 200", archive(b"\x80\xc8N."))
hostile("an unknown operation", "attack", "no operation 0xff", archive(program(b"\xff")))

# Structure and size.
hostile("a list in itself", "attack", "a value that contains itself", archive(program(b"]q\x00h\x00a")))
hostile(
    "a dict in itself",
    "attack",
    "a value that contains itself",
    archive(program(b"}q\x00" + text("a") + b"h\x00s")),
)
hostile("a loop of two", "attack", "a value that contains itself", archive(program(b"]q\x00]q\x01h\x00aa")))
hostile("nested tuples", "attack", "nested at most", archive(program(b"N" + b"\x85" * 100_000)))
hostile("nested marks", "attack", "nested at most", archive(program(b"(" * 100_000)))
laughs = b"]" + b"".join(b"q\x00](" + b"h\x00" * 100 + b"e" for _ in range(19))
hostile(
    "a billion laughs", "attack", "values are left over|expected an attack_result", archive(program(laughs))
)
hostile("a memo bomb", "attack", "stores an object under the number", archive(program(b"Nr\xff\xff\xff\xff")))
hostile(
    "a memo bomb in text", "attack", "stores an object under the number", archive(program(b"Np99999999999\n"))
)
hostile("an unknown reference", "attack", "refers to a value 7", archive(program(b"h\x07")))
hostile("millions of operations", "attack", "at most 1000000 operations", archive(program(b"N" * 1_000_001)))
hostile(
    "bytes that are not there",
    "attack",
    "bytes are announced",
    archive(program(b"\x8e" + struct.pack("<Q", 1 << 60))),
)
hostile("a text that is not there", "attack", "bytes are announced", archive(program(b"X\xff\xff\xff\xff")))
hostile(
    "a number of a megabyte",
    "attack",
    "numbers of at most",
    archive(program(b"\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20))),
)
hostile(
    "a number of many digits",
    "attack",
    "at most 1000 characters",
    archive(program(b"I" + b"9" * 100_000 + b"\n")),
)
hostile(
    "a key of a megabyte", "attack", "keys of at most", archive(program(b"}" + text("k" * (1 << 20)) + b"Ns"))
)
hostile("a tuple as a key", "attack", "texts or numbers as keys", archive(program(b"})Ns")))
encode = b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"
hostile(
    "bytes made again and again",
    "attack",
    "values of at most",
    archive(program(text("a" * (1 << 20)) + b"q\x00](" + encode * 500 + b"e")),
)
hostile("a truncated pickle", "attack", "ends before its last operation", archive(b"\x80\x02}"))
hostile("an empty stack", "attack", "values are missing", archive(b"\x80\x02R."))
hostile("two values", "attack", "values are left over", archive(program(b"NN")))
hostile(
    "something behind the pickle",
    "attack",
    "something follows the pickle",
    archive(program(b"N") + b"cos\nsystem\n."),
)
shape = call("numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", single(1 << 50), text("b"))
hostile(
    "an array without values",
    "attack",
    "expected an array with values|missing|expected an attack_result",
    archive(program(shape)),
)
dtype = call("numpy.dtype", text("f8"))
hostile(
    "an array of another size",
    "attack",
    "as many bytes as its shape says",
    archive(program(shape + b"(K\x01" + single(1 << 50) + dtype + b"\x89C\x08" + b"\0" * 8 + b"tb")),
)
hostile(
    "a negative shape",
    "attack",
    "as many bytes as its shape says",
    archive(program(shape + b"(K\x01" + pair(-1, -1) + dtype + b"\x89C\x08" + b"\0" * 8 + b"tb")),
)

# Tensors.
for name, reason, tensors in (
    ("a tensor outside", "outside its storage", [tensor(pair(2, 4), pair(4, 1))]),
    ("an offset outside", "outside its storage", [tensor(single(2), single(1), offset=5)]),
    ("an offset of 2**60", "outside its storage", [tensor(single(2), single(1), offset=1 << 60)]),
    ("a negative offset", "size or stride that is none", [tensor(single(2), single(1), offset=-1)]),
    ("a negative stride", "size or stride that is none", [tensor(single(2), single(-1))]),
    ("a negative size", "size or stride that is none", [tensor(single(-2), single(1))]),
    ("a tensor that repeats one number", "overlap or lie apart", [tensor(single(6), single(0))]),
    ("a tensor of 2**60 equal numbers", "outside its storage", [tensor(single(1 << 60), single(0))]),
    ("a tensor with gaps", "overlap or lie apart", [tensor(single(3), single(2))]),
    ("a stride that leaves the storage", "overlap or lie apart", [tensor(pair(1, 2), pair(1, 1 << 40))]),
    (
        "two tensors that overlap",
        "two tensors that overlap",
        [tensor(single(4), single(1)), tensor(single(4), single(1), offset=2)],
    ),
    ("the same numbers twice", "two tensors that overlap", [tensor(single(6), single(1))] * 2),
    (
        "ten axes",
        "size or stride that is none",
        [tensor(b"(" + b"K\x01" * 10 + b"t", b"(" + b"K\x01" * 10 + b"t")],
    ),
    ("a storage that is not there", "expected 24 bytes, got none", [tensor(single(6), single(1), key="1")]),
    ("a storage of another size", "expected 4000 bytes, got 24", [tensor(single(6), single(1), count=1000)]),
    ("a storage of 2**60 numbers", "refused storage", [tensor(single(6), single(1), count=1 << 60)]),
    ("a storage of -1 numbers", "refused storage", [tensor(single(6), single(1), count=-1)]),
    (
        "a storage of another type",
        "described in two ways|expected 48 bytes",
        [tensor(single(6), single(1), kind="LongStorage")],
    ),
    ("a storage in another folder", "refused storage", [tensor(single(6), single(1), key="../../secret")]),
):
    hostile(name, "attack", reason, archive(state(*tensors), STORAGE))
hooks = tensor(single(6), single(1)).replace(b"OrderedDict\n)R", b"OrderedDict\n)R" + text("h") + b"Ns")
hostile("a tensor with hooks", "attack", "a tensor with hooks", archive(state(hooks), STORAGE))

# Archives.
GOOD = saved(result())


def renamed(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{ROOT}/data.pkl", program(b"N"))
        file.writestr(name, b"")
    return buffer.getvalue()


for name in (
    "../escaped",
    f"{ROOT}/../../escaped",
    "/etc/passwd",
    f"{ROOT}\\..\\escaped",
    "C:/escaped",
    f"{ROOT}/" + "n" * 500,
    f"{ROOT}/\x01",
    "plain",
    f"{ROOT}/",
):
    hostile(f"a member named {name[:20]!r}", "attack", "refused member", renamed(name))
hostile("a member of another folder", "attack", "expected one folder", renamed("other/data"))


def twice(path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")
        for _ in range(2):
            file.writestr(f"{ROOT}/data.pkl", program(b"N"))


hostile("a member that is there twice", "attack", "which is there twice", twice)
hostile(
    "a compressed bomb",
    "attack",
    "which is compressed",
    archive(b"\0" * (64 << 20), compression=zipfile.ZIP_DEFLATED),
)


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


PLAIN = archive(program(b"N"))
ENTRY, END = PLAIN.index(b"PK\x01\x02"), PLAIN.index(b"PK\x05\x06")
SECOND = PLAIN.index(b"PK\x01\x02", ENTRY + 4)
hostile("an encrypted member", "attack", "which is encrypted", patched(PLAIN, ENTRY + 8, b"\x01"))
hostile(
    "a member of another checksum",
    "attack",
    "does not have its checksum",
    patched(PLAIN, ENTRY + 16, b"\0\0\0\0"),
)
hostile("members that overlap", "attack", "overlap|two names", patched(PLAIN, SECOND + 42, b"\0\0\0\0"))
hostile("a member with two names", "attack", "which has two names", patched(PLAIN, 30, b"another"))
hostile(
    "a member that is nowhere",
    "attack",
    "does not lie where",
    patched(PLAIN, ENTRY + 42, b"\xf0\xff\xff\x00"),
)
hostile(
    "a member beyond the file",
    "attack",
    "is cut off",
    patched(PLAIN, ENTRY + 20, struct.pack("<II", 1 << 30, 1 << 30)),
)
hostile(
    "65,534 members",
    "attack",
    "expected an archive of at most",
    patched(PLAIN, END + 8, struct.pack("<HH", 65534, 65534)),
)
hostile(
    "a directory of gigabytes",
    "attack",
    "expected an archive of at most",
    patched(PLAIN, END + 12, struct.pack("<I", 3 << 30)),
)
hostile(
    "a directory elsewhere",
    "attack",
    "does not lie before its end",
    patched(PLAIN, END + 16, struct.pack("<I", 3)),
)
hostile("an archive with a comment", "attack", "its end is missing", PLAIN[:-2] + b"\x04\0evil")
hostile(
    "two ends that differ",
    "attack",
    "its two ends differ",
    patched(GOOD, GOOD.index(b"PK\x05\x06") + 8, struct.pack("<HH", 1, 1)),
)
hostile("a truncated archive", "attack", "its end is missing", GOOD[: len(GOOD) // 2])
hostile("big-endian numbers", "attack", "little-endian", archive(program(b"N"), {"byteorder": b"big"}))
hostile("an archive without a pickle", "attack", "data.pkl", PLAIN.replace(b"data.pkl", b"date.pkl"))
damaged = bytearray(GOOD)
damaged[GOOD.index(np.arange(6, dtype=np.float32).tobytes())] ^= 0xFF
hostile("damaged weights", "attack", "does not have its checksum", bytes(damaged))

# The form before PyTorch 1.6.
OLD = saved(result(), old=True)
hostile("another magic number", "attack", "got another pickle", old_form(program(b"N"), [], magic=1))
hostile("another old protocol", "attack", "protocol 1001", old_form(program(b"N"), [], protocol=1000))
hostile("old big-endian numbers", "attack", "little-endian", old_form(program(b"N"), [], little_endian=False))
hostile(
    "a global in an old head",
    "attack",
    r"refused global os\.system",
    program(b"cos\nsystem\n(" + text(TOUCH) + b"tR"),
)
hostile(
    "an old storage of 2**36 numbers",
    "attack",
    "of which the file has fewer",
    old_form(state(tensor(single(6), single(1), count=1 << 36)), ["0"]),
)
hostile(
    "an old storage of fewer numbers",
    "attack",
    "does not have the 6 numbers",
    old_form(state(tensor(single(6), single(1))), ["0"], struct.pack("<q", 5) + bytes(24)),
)
hostile(
    "an old file with other storages",
    "attack",
    "the names of its storages",
    old_form(state(tensor(single(6), single(1))), []),
)
hostile("an old file that is cut off", "attack", "damaged|refused", OLD[:-3])
hostile("an old file with more behind", "attack", "something follows", OLD + b"evil")

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
