"""Read untrusted weight files: safetensors files, and state dicts in torch's two formats.

No code in a file is executed. Torch's files are pickles: before `torch.load` reads one with `weights_only`, its
instructions are listed, and any name that a state dict of dense tensors does not need is an error. Sizes are checked
before memory is allocated, so that reading takes about as much memory as the file has bytes.
"""

from __future__ import annotations

import io
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.wording.spelling import near_names

SAFETENSORS, ZIP, LEGACY = "safetensors", "torch's zip format", "torch's old format"
# The formats that are allowed for each suffix.
SUFFIXES = {".safetensors": (SAFETENSORS,)} | dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (ZIP, LEGACY))
# A thousand tensors take about 100 KB and 20,000 pickle instructions.
LARGEST_HEADER = 16 << 20
MOST_OPCODES = 500_000
MOST_MEMBERS = 200_000
# Tensors may share memory, such as tied weights. Their total size may be at most this multiple of the file's size.
MOST_SHARED = 4
# Keys under which training scripts save the state dict in a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
LISTED_KEYS = 10
# The names in a pickle that a checkpoint of dense tensors needs.
ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch(\.cuda)? \w+Storage|torch (Size|device|b?float\d+|u?int\d+|bool)|torch\.nn\.parameter Parameter"
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


@dataclass(frozen=True)
class Weights:
    """The weights in a file.

    Attributes:
        file: The file.
        tensors: Dense tensors on the CPU, by name, in the order of the file.
        metadata: The metadata in the header of a safetensors file; empty for torch's formats.
        notes: How the weights were read, each note as one sentence for the user.
    """

    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_weights(path: Path | str) -> Weights:
    """Read a safetensors file, or a state dict that `torch.save` wrote.

    The format is detected from the content and must match the suffix. A state dict may be in a dict under one of the
    keys in `WRAPPERS`. Links to regular files are followed.

    Args:
        path: The file.

    Raises:
        RecordError: The file is missing, damaged, declares more data than it contains, or does not contain only named
            tensors. The message is one line that names the file and the reason.
    """
    file = Path(path)
    size, form = check_weights(file)
    if form == SAFETENSORS:
        tensors, metadata = _read_safetensors(file, size)
        return _checked(Weights(file, tensors, metadata), size)
    if form == ZIP:
        _check_zip(file, size)
    else:
        _check_legacy(file, size)
    tensors, notes = _unwrap(file, _load_torch(file, mapped=form == ZIP))
    return _checked(Weights(file, tensors, {}, notes), size)


def check_weights(file: Path) -> tuple[int, str]:
    """Check from its first bytes that a file may contain weights.

    Returns:
        The size of the file in bytes, and its format: `SAFETENSORS`, `ZIP` or `LEGACY`.

    Raises:
        RecordError: The file is missing or has another format.
    """
    size = _check_file(file)
    form = _format_of(file, size)
    wanted = SUFFIXES.get(file.suffix.lower(), (form,))
    if form not in wanted:
        raise _refusal(file, f"expected {wanted[0]} because of its suffix, but its content is {form}")
    return size, form


def _refusal(file: Path, reason: str) -> RecordError:
    return RecordError(f"weights {file}: {reason}")


def _check_file(file: Path) -> int:
    """Return the size of a regular file. Raises RecordError for anything else, such as a pipe, which would block."""
    try:
        found = file.stat()
    except FileNotFoundError:
        raise _refusal(file, _missing(file)) from None
    except (OSError, ValueError) as error:
        raise _refusal(file, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise _refusal(file, f"expected a file, got {kind}")
    if not found.st_size:
        raise _refusal(file, "is empty")
    return found.st_size


def _missing(file: Path) -> str:
    """Why a file is not found, with similar file names in the same folder."""
    if file.is_symlink():
        return "is a link to a file that is not there"
    try:
        near = near_names(file.name, [path.name for path in file.parent.iterdir() if path.is_file()])
    except OSError:
        near = []
    return f"not found; did you mean {' or '.join(map(repr, near))}?" if near else "not found"


def _format_of(file: Path, size: int) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError as error:
        raise _refusal(file, f"cannot be read: {error.strerror}") from error
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if start[8:9] == b"{":
        return SAFETENSORS
    if start.startswith(b"\x80"):
        return LEGACY
    if file.suffix.lower() in SUFFIXES:
        raise _refusal(file, f"does not match its suffix: expected {SUFFIXES[file.suffix.lower()][0]}")
    raise _refusal(file, "expected a safetensors file or a state dict that torch.save wrote")


def _read_safetensors(file: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > min(LARGEST_HEADER, size - 8):
        raise _refusal(
            file, f"its header has {header:,} bytes, of a file of {size:,} (at most {LARGEST_HEADER:,})"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise _refusal(file, f"is not a valid safetensors file: {_first_line(error)}") from error


def _check_zip(file: Path, size: int) -> None:
    """Check the members of a zip file and its pickle before `torch.load` reads them."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS:
                raise _refusal(file, f"has {len(members):,} members, expected at most {MOST_MEMBERS:,}")
            for member in members:
                _check_member(file, member)
            if (total := sum(member.file_size for member in members)) > size:
                raise _refusal(file, f"its members have {total:,} bytes, more than the file's {size:,}")
            pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise _refusal(file, f"expected one data.pkl in the zip file, found {len(pickles)}")
            if pickles[0].file_size > LARGEST_HEADER:
                raise _refusal(
                    file, f"its data.pkl has {pickles[0].file_size:,} bytes (at most {LARGEST_HEADER:,})"
                )
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _refusal(file, f"is not a valid zip file: {_first_line(error)}") from error
    _check_pickle(file, io.BytesIO(content), largest=None)


def _check_member(file: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
        raise _refusal(file, f"has a member that leaves its folder: {_short(name)}")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise _refusal(
            file, f"has a compressed or encrypted member, which torch.save does not write: {_short(name)}"
        )


def _check_legacy(file: Path, size: int) -> None:
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
                raise _refusal(file, f"its pickle has more than {MOST_OPCODES:,} instructions")
            tuples.follow(code, argument)
            if tuples.total > MOST_IN_TUPLES:
                raise _refusal(file, f"its tuples have more than {MOST_IN_TUPLES:,} values; {ADVICE}")
            if code.name == "GLOBAL" and not ADMITTED.fullmatch(str(argument)):
                raise _refusal(
                    file, f"contains {_short(str(argument).replace(' ', '.'))}, not only tensors; {ADVICE}"
                )
            if code.name in REFUSED_OPCODES:
                raise _refusal(
                    file, f"contains an instruction that no state dict has ({code.name}); {ADVICE}"
                )
            if largest is not None and type(argument) is int and argument > largest:
                raise _refusal(
                    file, f"contains the number {_short(str(argument))}, which is larger than the file"
                )
    except (ValueError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise _refusal(file, f"is not a valid pickle: {_first_line(error)}") from error


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


ADVICE = "save model.state_dict() with torch.save or safetensors"


def _load_torch(file: Path, *, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds of errors for a damaged file.
        raise _refusal(file, f"cannot be read as a state dict: {_first_line(error)}") from error


def _unwrap(file: Path, content: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the state dict in what `torch.load` returned, and a note if it was inside another dict."""
    if not isinstance(content, dict):
        raise _refusal(file, f"expected a dict of tensors, got {type(content).__name__}")
    if any(isinstance(value, Tensor) for value in content.values()):
        return dict(content), ()
    known = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if len(known) != 1:
        found = (
            ", ".join(known)
            if known
            else ", ".join(_short(str(key)) for key in list(content)[:LISTED_KEYS]) or "nothing"
        )
        raise _refusal(
            file, f"expected a state dict, or one under one of the keys {', '.join(WRAPPERS)}; got {found}"
        )
    return dict(content[known[0]]), (
        f"the state dict is under the key {known[0]!r}{_not_read(content, known[0])}",
    )


def _not_read(content: Mapping[Any, Any], key: str) -> str:
    """The other keys of a checkpoint, such as averaged weights (EMA), which are another model; "" if there are none."""
    others = [_short(str(other)) for other in content if other != key]
    more = f" and {len(others) - LISTED_KEYS} more" if len(others) > LISTED_KEYS else ""
    return f"; not read: {', '.join(others[:LISTED_KEYS])}{more}" if others else ""


def _checked(weights: Weights, size: int) -> Weights:
    """Check that all values are named dense tensors, and that their total size is possible for the file."""
    file, total = weights.file, 0
    if not weights.tensors:
        raise _refusal(file, "contains no tensors")
    for name, tensor in weights.tensors.items():
        if not isinstance(name, str):
            raise _refusal(file, f"expected names of tensors, got {_short(repr(name))}")
        if not isinstance(tensor, Tensor):
            raise _refusal(file, f"{_short(name)}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise _refusal(
                file, f"{_short(name)}: expected a dense tensor, got {tensor.layout} on {tensor.device}"
            )
        values = tensor.numel() * tensor.element_size()
        total += values
        if values > tensor.untyped_storage().nbytes() or total > MOST_SHARED * size:
            raise _refusal(file, f"{_short(name)}: the tensors have more values than the file can contain")
    return weights


def _short(text: str) -> str:
    """Format a text from a file for a message: printable, in one line, at most 60 characters."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    shown = text if text.isprintable() else ascii(text)
    return (shown[:200] or type(error).__name__).rstrip(". ")
