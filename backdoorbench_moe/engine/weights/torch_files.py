"""Read the state dicts that `torch.save` wrote, in its zip format and its old one.

Both contain pickles. `torch.load` reads them with `weights_only` after `instructions` has checked them.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from backdoorbench_moe.engine.weights.instructions import LARGEST_HEADER, check_pickle
from backdoorbench_moe.engine.weights.refusals import first_line, refusal, short
from backdoorbench_moe.engine.weights.stand_ins import STAND_INS

MOST_MEMBERS = 200_000
# Number of pickles at the start of a file in the old format, before the storages. The first three are constants.
LEGACY_PICKLES, LEGACY_CONSTANTS = 5, 3


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
    except zipfile.BadZipFile as error:
        # The file begins as a zip file, whose directory is at the end: the usual cause is a download that broke off.
        raise refusal(file, f"seems to be incomplete or damaged: {first_line(error)}") from error
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise refusal(file, f"is not a valid zip file: {first_line(error)}") from error
    check_pickle(file, io.BytesIO(content), largest=None)


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
        check_pickle(file, head, largest=size if number >= LEGACY_CONSTANTS else None)


def load_torch(file: Path, *, mapped: bool) -> object:
    """Read a file whose pickle was checked with `check_zip` or `check_legacy`.

    Args:
        file: The file.
        mapped: Whether to map the tensors into memory; only possible in the zip format.

    Returns:
        The content. Values beside the tensors are stand-ins without meaning.

    Raises:
        RecordError: The file is damaged.
    """
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds of errors for a damaged file.
        raise refusal(file, f"cannot be read as a state dict: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the reason in an error of `torch.load`, without the advice to run the code in the file."""
    parts = str(error).split("\n\n")
    advised = isinstance(error, pickle.UnpicklingError) and len(parts) > 1
    return first_line(ValueError(parts[1])) if advised else first_line(error)
