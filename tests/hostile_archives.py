"""Archives and tensors of torch that are made to harm whoever reads them, in both forms."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
from hostile import TOUCH, hostile
from torch_files import (
    ROOT,
    STORAGE,
    archive,
    number,
    old_form,
    pair,
    program,
    result,
    saved,
    single,
    state,
    tensor,
    text,
)

# More than torch's integers hold: alone, or as a product.
HUGE, EMPTY = 1 << 70, number(0) + number(1 << 62) * 2 + b"\x87"

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
        "an empty tensor with a size of 2**70",
        "larger than any that is read",
        [tensor(pair(0, HUGE), pair(1, 1))],
    ),
    ("an empty tensor of 2**124 rows", "larger than any that is read", [tensor(EMPTY, EMPTY)]),
    (
        "a stride of 2**70 that is not used",
        "larger than any that is read",
        [tensor(pair(1, 6), pair(HUGE, 1))],
    ),
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
nested: list[object] = []
for _ in range(19):
    nested = [nested] * 100
for name, key in {"a number": 1, "a billion laughs": nested}.items():
    hostile(
        f"an old file with a storage named by {name}",
        "attack",
        "the names of its storages",
        old_form(state(tensor(single(6), single(1))), [key]),
    )
hostile("an old file that is cut off", "attack", "damaged|refused", OLD[:-3])
hostile("an old file with more behind", "attack", "something follows", OLD + b"evil")
