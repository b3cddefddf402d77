"""Read untrusted weight files: safetensors files, and state dicts in torch's two formats.

No code in a file is executed. Sizes are checked before memory is allocated, so that reading takes about as much memory
as the file has bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backdoorbench_moe.engine.weights.instructions import LARGEST_HEADER
from backdoorbench_moe.engine.weights.refusals import first_line, refusal, short
from backdoorbench_moe.engine.weights.stand_ins import Unread
from backdoorbench_moe.engine.weights.torch_files import check_legacy, check_zip, load_torch
from backdoorbench_moe.paths import near_files
from backdoorbench_moe.wording.spelling import near_names

SAFETENSORS, ZIP, LEGACY = "safetensors", "torch's zip format", "torch's old format"
# The formats that are allowed for each suffix.
SUFFIXES = {".safetensors": (SAFETENSORS,)} | dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (ZIP, LEGACY))
# Tensors may share memory, such as tied weights. Their total size may be at most this multiple of the file's size.
MOST_SHARED = 4
# Keys under which training scripts save the state dict in a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
LISTED_KEYS = 10


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


def read_weights(path: Path | str, key: str | None = None) -> Weights:
    """Read a safetensors file, or a state dict that `torch.save` wrote.

    The format is detected from the content and must match the suffix. Links to regular files are followed.

    Args:
        path: The file.
        key: The key of the state dict in a checkpoint, such as "state_dict_ema". None for a file that is a state dict,
            or has one under exactly one of the keys in `WRAPPERS`.

    Raises:
        RecordError: The file is missing, damaged, declares more data than it contains, or does not contain only named
            tensors, or there is no state dict under the key. The message is one line that names the file and the
            reason.
    """
    file = Path(path)
    size, form = check_weights(file)
    if form == SAFETENSORS:
        if key is not None:
            raise refusal(file, f"expected a checkpoint with the key {short(key)!r}, got a safetensors file")
        tensors, metadata = _read_safetensors(file)
        return _checked(Weights(file, tensors, metadata), size)
    tensors, notes = _unwrap(file, load_torch(file, mapped=form == ZIP), key)
    return _checked(Weights(file, tensors, {}, notes), size)


def check_weights(file: Path) -> tuple[int, str]:
    """Check that a file may contain weights, from its first bytes and its header; no tensors are read.

    Returns:
        The size of the file in bytes, and its format: `SAFETENSORS`, `ZIP` or `LEGACY`.

    Raises:
        RecordError: The file is missing, has another format, or its header is damaged.
    """
    size = _check_file(file)
    form = _format_of(file, size)
    wanted = SUFFIXES.get(file.suffix.lower(), (form,))
    if form not in wanted:
        raise refusal(file, f"expected {wanted[0]} because of its suffix, but its content is {form}")
    if form == SAFETENSORS:
        _check_safetensors(file, size)
    elif form == ZIP:
        check_zip(file, size)
    else:
        check_legacy(file, size)
    return size, form


def _check_file(file: Path) -> int:
    """Return the size of a regular file. Raises RecordError for anything else, such as a pipe, which would block."""
    try:
        found = file.stat()
    except FileNotFoundError:
        raise refusal(file, _missing(file)) from None
    except (OSError, ValueError) as error:
        raise refusal(file, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise refusal(file, f"expected a file, got {kind}")
    if not found.st_size:
        raise refusal(file, "is empty")
    return found.st_size


def _missing(file: Path) -> str:
    """Why a file is not found, with similar file names in the same folder."""
    if file.is_symlink():
        return "is a link to a file that is not there"
    near = near_files(file)
    return f"not found; did you mean {' or '.join(map(repr, near))}?" if near else "not found"


def _format_of(file: Path, size: int) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError as error:
        raise refusal(file, f"cannot be read: {error.strerror}") from error
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if start[8:9] == b"{":
        return SAFETENSORS
    if start.startswith(b"\x80"):
        return LEGACY
    if file.suffix.lower() in SUFFIXES:
        raise refusal(file, f"does not match its suffix: expected {SUFFIXES[file.suffix.lower()][0]}")
    raise refusal(file, "expected a safetensors file or a state dict that torch.save wrote")


def _check_safetensors(file: Path, size: int) -> None:
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > min(LARGEST_HEADER, size - 8):
        raise refusal(
            file, f"its header has {header:,} bytes, of a file of {size:,} (at most {LARGEST_HEADER:,})"
        )
    with _open_safetensors(file):
        pass  # The header is read, and compared with the size of the file.


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _open_safetensors(file) as opened:
        metadata = dict(opened.metadata() or {})
        return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise refusal(file, f"is not a valid safetensors file: {first_line(error)}") from error


def _unwrap(file: Path, content: object, key: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the state dict in what `torch.load` returned, and a note if it was inside another dict."""
    if not isinstance(content, dict):
        raise refusal(file, f"expected a dict of tensors, got {type(content).__name__}")
    found = _plain(content)
    # Not copied here, since a small file can have the same large dict under many keys.
    states = {_text(name): value for name, value in found.items() if isinstance(value, dict)}
    # A checkpoint may have tensors beside its state dict, such as the best accuracy.
    inside = any(_has_tensors(states.get(wrapper, {})) for wrapper in WRAPPERS)
    if key is None and _has_tensors(found) and not inside:
        return found, ()
    if key is None:
        key = _only_key(file, found, states)
    elif not _has_tensors(states.get(key, {})):
        known = [name for name, state in states.items() if _has_tensors(state)]
        raise refusal(file, f"expected a state dict under the key {short(key)!r}; {_offered(key, known)}")
    return _plain(states[key]), (f"the state dict is under the key {short(key)!r}{_not_read(found, key)}",)


def _plain(content: dict[Any, Any]) -> dict[Any, Any]:
    """Copy a dict. Attributes that a pickle gave to an ordered dict may hide its methods."""
    return {name: dict.__getitem__(content, name) for name in dict.__iter__(content)}


def _text(key: object) -> str:
    """Return a key of a dict as text. The text of a tuple could be larger than any memory."""
    return str(key) if isinstance(key, str | int | float | Unread) else f"a {type(key).__name__}"


def _has_tensors(state: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in dict.values(state))


def _only_key(file: Path, content: Mapping[Any, Any], states: Mapping[str, dict[Any, Any]]) -> str:
    """Return the only key in `WRAPPERS` with a state dict."""
    known = [key for key in WRAPPERS if key in states]
    known = [key for key in known if _has_tensors(states[key])] or known
    if len(known) == 1:
        return known[0]
    if known:
        advice = f"choose one of {', '.join(known)} with model.weights_key (--weights-key)"
        raise refusal(file, f"expected one state dict, got several; {advice}")
    found = ", ".join(short(_text(key)) for key in list(content)[:LISTED_KEYS]) or "nothing"
    raise refusal(
        file, f"expected a state dict, or one under one of the keys {', '.join(WRAPPERS)}; got {found}"
    )


def _offered(key: str, known: list[str]) -> str:
    """The keys with state dicts, for a message, with those that are spelled similarly to a key that has none."""
    if not known:
        return "the file has no key with a state dict"
    if near := near_names(key, known):
        return f"did you mean {' or '.join(map(short, near))}?"
    return f"got {', '.join(map(short, known[:LISTED_KEYS]))}"


def _not_read(content: Mapping[Any, Any], key: str) -> str:
    """The other keys of a checkpoint, such as averaged weights (EMA), which are another model; "" if there are none."""
    others = [short(_text(other)) for other in content if other != key]
    more = f" and {len(others) - LISTED_KEYS} more" if len(others) > LISTED_KEYS else ""
    return f"; not read: {', '.join(others[:LISTED_KEYS])}{more}" if others else ""


def _checked(weights: Weights, size: int) -> Weights:
    """Check that all values are named dense tensors, and that their total size is possible for the file."""
    file, total = weights.file, 0
    if not weights.tensors:
        raise refusal(file, "contains no tensors")
    for name, tensor in weights.tensors.items():
        if not isinstance(name, str):
            raise refusal(file, f"expected names of tensors, got {short(_text(name))}")
        if not isinstance(tensor, Tensor):
            raise refusal(file, f"{short(name)}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise refusal(
                file, f"{short(name)}: expected a dense tensor, got {tensor.layout} on {tensor.device}"
            )
        values = tensor.numel() * tensor.element_size()
        total += values
        if values > tensor.untyped_storage().nbytes() or total > MOST_SHARED * size:
            raise refusal(file, f"{short(name)}: the tensors have more values than the file can contain")
    return weights
