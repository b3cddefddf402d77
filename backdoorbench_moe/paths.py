"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path

from backdoorbench_moe.errors import ConfigError


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading "~" or "~user" replaced by that home directory.

    A shell does this for `--output ~/runs`, but not for `--output=~/runs`, and Python never does.

    Raises:
        ConfigError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError.expected("path", "an existing user behind '~'", str(path)) from error
