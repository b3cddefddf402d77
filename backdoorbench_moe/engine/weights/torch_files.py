"""Read the state dicts that `torch.save` wrote, in its zip format and its old one.

Both contain pickles. Before `torch.load` reads one with `weights_only`, its instructions are listed, and any name that
is not in `ADMITTED` or `SETTINGS` is an error.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from backdoorbench_moe.engine.weights.refusals import first_line, refusal, short

# A thousand tensors take about 100 KB and 20,000 pickle instructions.
LARGEST_HEADER = 16 << 20
MOST_OPCODES = 500_000
MOST_MEMBERS = 200_000
# The names in a pickle that a checkpoint of dense tensors needs.
ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch(\.cuda)? \w+Storage|torch (Size|device|b?float\d+|u?int\d+|bool)|torch\.nn\.parameter Parameter"
)
# Classes of the settings that training scripts save in a checkpoint, beside the state dict. They are never imported.
SETTINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
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
REFUSED_OPCODES = (
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "EXT1",
    "EXT2",
    "EXT4",
    "NEWOBJ_EX",
    "BYTEARRAY8",
    "NEXT_BUFFER",
)
# Maximum number of values in all tuples that a pickle creates or uses again. Python hashes a tuple by hashing all its
# values again, which takes forever if each of many tuples contains the previous one twice.
MOST_IN_TUPLES = 10 * MOST_OPCODES
# Number of pickles at the start of a file in the old format, before the storages. The first three are constants.
LEGACY_PICKLES, LEGACY_CONSTANTS = 5, 3
ADVICE = "save model.state_dict() with torch.save or safetensors"


def check_zip(file: Path, size: int) -> None:
    """Check the members of a zip file and its pickle before `torch.load` reads them."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                raise refusal(file, f"has {len(members):,} members, expected at most {MOST_MEMBERS:,}")
            for member in members:
                _check_member(file, member)
            if (total := sum(member.file_size for member in members)) > size:
                raise refusal(file, f"its members have {total:,} bytes, more than the file's {size:,}")
            pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise refusal(file, f"expected one data.pkl in the zip file, found {len(pickles)}")
            if pickles[0].file_size > LARGEST_HEADER:
                raise refusal(
                    file, f"its data.pkl has {pickles[0].file_size:,} bytes (at most {LARGEST_HEADER:,})"
                )
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise refusal(file, f"is not a valid zip file: {first_line(error)}") from error
    _check_pickle(file, io.BytesIO(content), largest=None)


def _check_member(file: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
        raise refusal(file, f"has a member that leaves its folder: {short(name)}")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise refusal(
            file, f"has a compressed or encrypted member, which torch.save does not write: {short(name)}"
        )


def check_legacy(file: Path, size: int) -> None:
    """Check the pickles at the start of a file in torch's old format."""
    with file.open("rb") as opened:
        head = io.BytesIO(opened.read(LARGEST_HEADER))
    for number in range(LEGACY_PICKLES):
        # A storage is created with the size in the pickle, which cannot be larger than the file.
        _check_pickle(file, head, largest=size if number >= LEGACY_CONSTANTS else None)


def _check_pickle(file: Path, content: io.BytesIO, largest: int | None) -> None:
    """List the instructions of a pickle without executing them, and raise an error for disallowed names and numbers.

    Args:
        file: The file, for error messages.
        content: The pickle; it is read up to its end.
        largest: The largest integer that is allowed; None for no limit.
    """
    tuples = _Tuples()
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(content)):
            if number > MOST_OPCODES:
                raise refusal(file, f"its pickle has more than {MOST_OPCODES:,} instructions")
            tuples.follow(code, argument)
            if tuples.total > MOST_IN_TUPLES:
                raise refusal(file, f"its tuples have more than {MOST_IN_TUPLES:,} values; {ADVICE}")
            if code.name == "GLOBAL" and not _admitted(str(argument)):
                raise refusal(
                    file, f"contains {short(str(argument).replace(' ', '.'))}, not only tensors; {ADVICE}"
                )
            if code.name in REFUSED_OPCODES:
                raise refusal(file, f"contains an instruction that no state dict has ({code.name}); {ADVICE}")
            if largest is not None and type(argument) is int and argument > largest:
                raise refusal(
                    file, f"contains the number {short(str(argument))}, which is larger than the file"
                )
    except (ValueError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise refusal(file, f"is not a valid pickle: {first_line(error)}") from error


def _admitted(name: str) -> bool:
    """Return whether a pickle may contain a name, which is written as module, space and name."""
    if ADMITTED.fullmatch(name):
        return True
    return name.replace("__builtin__ ", "builtins ").replace(" ", ".", 1) in SETTINGS


class _Tuples:
    """Follows the stack of a pickle to count the values in its tuples.

    Attributes:
        total: Number of values in all tuples that were created or used again so far.
    """

    def __init__(self) -> None:
        # The number of values in each tuple on the stack, including tuples in it; 1 for other values, None for marks.
        self._stack: list[int | None] = []
        self._memo: dict[Any, int] = {}
        self.total = 0

    def follow(self, code: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow an instruction. Raises ValueError if it takes values that were not created."""
        if "PUT" in code.name or code.name == "MEMOIZE":
            taken = self._take(["any"])
            self._memo[len(self._memo) if argument is None else argument] = taken[0]
            self._stack += taken
        elif "GET" in code.name:
            self._push(self._memo.get(argument, 1))
        elif code.name == "MARK":
            self._stack.append(None)
        else:
            taken = self._take([kind.name for kind in code.stack_before])
            is_tuple = code.name.startswith("TUPLE") or code.name == "DUP"
            for _ in code.stack_after:
                self._push(1 + sum(taken) if is_tuple else 1)

    def _push(self, values: int) -> None:
        self._stack.append(values)
        self.total += values if values > 1 else 0

    def _take(self, kinds: list[str]) -> list[int]:
        """Take values from the stack: all above the last mark if the kinds include one, and one for each other."""
        taken: list[int] = []
        if "mark" in kinds:
            while (values := self._pop()) is not None:
                taken.append(values)
            kinds = kinds[: kinds.index("mark")]
        return taken + [self._pop() or 1 for _ in kinds]

    def _pop(self) -> int | None:
        if not self._stack:
            raise ValueError("an instruction takes a value that is not there")
        return self._stack.pop()


class _Discarded:
    """Stands for a class of `SETTINGS`: an instance is an ordered dict, which takes any items and attributes."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def load_torch(file: Path, *, mapped: bool) -> object:
    """Read a file whose pickle was checked with `check_zip` or `check_legacy`.

    Args:
        file: The file.
        mapped: Whether to map the tensors into memory; only possible in the zip format.

    Returns:
        The content. Settings are ordered dicts without meaning.

    Raises:
        RecordError: The file is damaged.
    """
    stand_ins: list[Any] = [(_Discarded, name) for name in SETTINGS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds of errors for a damaged file.
        raise refusal(file, f"cannot be read as a state dict: {first_line(error)}") from error
