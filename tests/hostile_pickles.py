"""Pickles that are made to harm whoever reads them: globals, operations, structure and size."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import torch
from hostile import TOUCH, hostile
from PIL import Image
from torch_files import (
    Calls,
    archive,
    call,
    pair,
    program,
    result,
    saved,
    single,
    split,
    text,
)

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
hostile(
    "a global by number",
    "attack",
    "refused global whose name is no text",
    archive(program(b"K\x01K\x02\x93")),
)
# Lists of the list before, a hundred times: as text, more than any memory holds.
NESTED = b"]" + b"".join(b"q\x00](" + b"h\x00" * 100 + b"e" for _ in range(19))
for name, body in {
    "a global whose name is a billion laughs": text("os") + NESTED,
    "a global whose module is a billion laughs": NESTED + text("system"),
}.items():
    hostile(name, "attack", "refused global whose name is no text", archive(program(body + b"\x93")))
hostile(
    "an array of the other byte order",
    "attack",
    "refused numbers of the other byte order",
    saved(result(bd_test=split([0], 2, poison_indicator=np.zeros(2, ">f8")))),
)

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
hostile(
    "a billion laughs", "attack", "values are left over|expected an attack_result", archive(program(NESTED))
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
