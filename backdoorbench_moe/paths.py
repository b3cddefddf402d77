"""Paths as a user writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from backdoorbench_moe.errors import ConfigError, RecordError

CACHE_VARIABLE, CACHE = "BBMOE_CACHE", "~/.cache/backdoorbench_moe"


def expand(path: str | os.PathLike[str], parameter: str = "path") -> Path:
    """Return a path with a leading "~" or "~user" replaced by that home directory.

    A shell does this for `--output ~/runs`, but not for `--output=~/runs`, and Python never does.

    Args:
        path: The path.
        parameter: Name of the parameter that it is given by, for the error message.

    Raises:
        ConfigError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError.expected(parameter, "an existing user behind '~'", str(path)) from error


def cache_root() -> Path:
    """Return the folder of files that can be made again: $BBMOE_CACHE, or ~/.cache/backdoorbench_moe if not set.

    Raises:
        ConfigError: There is no such user as in "~user".
    """
    return expand(os.environ.get(CACHE_VARIABLE) or CACHE, f"${CACHE_VARIABLE}")


def check_output(folder: Path, parameter: str, files: Sequence[str]) -> None:
    """Check, without creating anything, that files can be written to a folder.

    Args:
        folder: The folder; it need not exist.
        parameter: What it was given by, for the message.
        files: Names of the files.

    Raises:
        ConfigError: A file is in the folder's place, or in that of a folder above it.
        RecordError: The folder cannot be written, or a folder is in the place of a file.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{parameter}: expected a folder, got {str(folder)!r}, where {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RecordError(f"{parameter}: expected a folder that can be written, {existing} cannot")
    for name in files:
        if (folder / name).is_dir():
            raise RecordError(f"{parameter}: {folder}: expected a file {name}, found a folder")
