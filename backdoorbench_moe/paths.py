"""Paths given by users, and the cache folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from backdoorbench_moe.errors import ConfigError, RecordError
from backdoorbench_moe.wording.spelling import near_names

CACHE_VARIABLE, CACHE = "BBMOE_CACHE", "~/.cache/backdoorbench_moe"


def expand(path: str | os.PathLike[str], parameter: str = "path") -> Path:
    """Return a path with a leading "~" or "~user" replaced by the home directory.

    A shell expands `--output ~/runs`, but not `--output=~/runs`.

    Args:
        path: The path.
        parameter: Name of the parameter, for the error message.

    Raises:
        ConfigError: The path is empty, as in `--output "$UNSET"`, or the user does not exist.
    """
    if not os.fspath(path):
        raise ConfigError.expected(parameter, "a file or folder", "")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError.expected(parameter, "an existing user behind '~'", str(path)) from error


def cache_root() -> Path:
    """Return the cache folder: $BBMOE_CACHE, or ~/.cache/backdoorbench_moe if it is not set.

    Raises:
        ConfigError: The user in "~user" does not exist.
    """
    return expand(os.environ.get(CACHE_VARIABLE) or CACHE, f"${CACHE_VARIABLE}")


def near_files(file: Path) -> list[str]:
    """Return the names of the files in the same folder of which the name of a missing file may be a misspelling."""
    try:
        return near_names(file.name, [path.name for path in file.parent.iterdir() if path.is_file()])
    except OSError:
        return []


def check_output(folder: Path, parameter: str, files: Sequence[str]) -> None:
    """Check, without creating anything, that files can be written to a folder.

    Args:
        folder: The folder; it need not exist.
        parameter: Name of the parameter, for the error message.
        files: Names of the files.

    Raises:
        ConfigError: The folder, or a parent of it, is a file.
        RecordError: The folder is not writable, or one of the files is a folder.
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
