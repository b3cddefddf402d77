"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path

from backdoorbench_moe.errors import ConfigError

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
