"""The names that a pickle with a state dict may contain, and stand-ins for the classes of other values in it.

Training scripts save settings, scores and dates beside the state dict. These values are dropped: their classes are
neither imported nor called. `weights_only` makes an object of a stand-in instead.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any, Self

from backdoorbench_moe.engine.weights.refusals import short
from backdoorbench_moe.errors import RecordError

# With this function, pickle writes bytes in protocol 2. `weights_only` calls it, in any encoding.
ENCODE = "_codecs encode"
# The names in a pickle that a checkpoint of dense tensors needs, written as module, space and name.
ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) (set|complex)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch(\.cuda)? \w+Storage"
    r"|torch (Size|device|b?float\d+|float8_\w+|complex\d+|u?int\d+|bool)|torch\.nn\.parameter Parameter"
    rf"|{ENCODE}"
)
# Names of Python 2, which pickle writes in protocol 2.
PYTHON_2 = {
    "__builtin__ long": "builtins int",
    "__builtin__ unicode": "builtins str",
    "__builtin__ xrange": "builtins range",
}
# Classes of settings, which have items and attributes; and types in them.
SETTINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "addict.addict.Dict",
    "easydict.EasyDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
# Classes of single values, which have no items.
VALUES = (
    "builtins.frozenset",
    "builtins.range",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    "numpy.ndarray",
    "torch.torch_version.TorchVersion",
    "torchvision.transforms.functional.InterpolationMode",
)
# Lists that drop their oldest items.
LISTS = ("collections.deque",)
# Booleans, numbers and texts of numpy; no objects, records or dates.
NUMPY_CODE = re.compile(r"([biufcSU])(\d{1,9})")
# The old and the new module of numpy.
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class Settings:
    """An instance is an ordered dict, which takes any items and attributes."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class UnreadList:
    """An instance is a list."""

    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]
        return []


class NoBytes:
    """Stands for `bytes`, which pickle calls for empty bytes; an instance is empty."""

    def __new__(cls, *_: object) -> bytes:  # type: ignore[misc]
        return b""


class Unread:
    """A value that may be a key of a dict."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return "a value that is not read"


class NumpyType(Unread):
    """Stands for `numpy.dtype`. `size` is the size of a value in bytes."""

    size: int

    def __new__(cls, *arguments: object) -> Self:
        match arguments:
            case (str(text), int(), int()):
                found = NUMPY_CODE.fullmatch(text)
                if found is None:
                    raise RecordError(f"expected a numpy type of numbers or texts, got {short(text)!r}")
                made = super().__new__(cls)
                made.size = int(found[2]) * (4 if found[1] == "U" else 1)
                return made
        raise RecordError("expected a numpy type of numbers or texts")


class NumpyNumber(Unread):
    """Stands for `scalar`, which numpy calls with the type and the bytes of a number."""

    def __new__(cls, *arguments: object) -> Self:
        match arguments:
            case (NumpyType(size=size), bytes(raw)) if len(raw) == size:
                return super().__new__(cls)
        raise RecordError("expected a numpy number with as many bytes as its type says")


class NumpyArray(Unread):
    """Stands for `_reconstruct`, which makes an array. Its shape, type and bytes follow as its state."""

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(), NumpyType(), int(), bytes()):
                return
        raise RecordError("expected a numpy array of numbers or texts")


# The stand-ins by module and name.
STAND_INS: dict[str, type] = {
    **dict.fromkeys(SETTINGS, Settings),
    **dict.fromkeys(VALUES, Unread),
    **dict.fromkeys(LISTS, UnreadList),
    "builtins.bytes": NoBytes,
    "numpy.dtype": NumpyType,
    **{f"{module}.scalar": NumpyNumber for module in NUMPY_MODULES},
    **{f"{module}._reconstruct": NumpyArray for module in NUMPY_MODULES},
}


def is_admitted(name: str) -> bool:
    """Return whether a pickle may contain a name, which is written as module, space and name."""
    if ADMITTED.fullmatch(name):
        return True
    name = PYTHON_2.get(name, name.replace("__builtin__ ", "builtins "))
    return name.replace(" ", ".", 1) in STAND_INS
