"""Paths of suites, scales and published tables, next to a user's suite or built in."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.paths import expand, near_files
from backdoorbench_moe.wording.spelling import near_names

# Links to benchmarks/suites and benchmarks/paper; an installed package contains copies.
ROOT = Path(__file__).parents[1] / "resources"


def names_in(folder: str, suffix: str = ".yaml") -> list[str]:
    """Return the names, without suffix, of the files in a built-in folder."""
    return sorted(file.stem for file in (ROOT / folder).glob(f"*{suffix}"))


def find_file(name: str, folder: str, what: str, near: Path | None = None, *, suffix: str = ".yaml") -> Path:
    """Find a file by its path, or by its bare name in `near` or in a built-in folder.

    Args:
        name: A path (with a "/", the suffix or ".yml"), or a bare name.
        folder: The built-in folder, such as "suites".
        what: What the file is, such as "suite" or "scale", for the error message.
        near: A folder to search first.
        suffix: Suffix of the file.

    Raises:
        UnknownNameError: No file has this bare name; the message suggests similar names.
        ConfigError: There is no file at this path; the message suggests similar names.
    """
    if name.endswith((suffix, ".yml")) or "/" in name:
        if _is_file(path := expand(name)):
            return path
        if _is_folder(path):
            raise ConfigError(f"{what}: expected a file, got the folder {name!r}")
        others = near_files(path) or near_names(path.stem, names_in(folder, suffix))
        advice = f"; did you mean {' or '.join(map(repr, others))}?" if others else ""
        raise ConfigError(f"{what}: {name!r} not found{advice}")
    for place in (near, ROOT / folder):
        if place is not None and _is_file(place / f"{name}{suffix}"):
            return place / f"{name}{suffix}"
    raise UnknownNameError(what, name, names_in(folder, suffix), "; or the path of a file")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # The text is too long for a file name.
        return False
