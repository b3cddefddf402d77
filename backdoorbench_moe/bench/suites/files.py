"""Paths of suites, scales and published tables: next to the user's own suite, or in the project."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.paths import expand

# Links to benchmarks/suites and benchmarks/paper; an installed package holds copies.
ROOT = Path(__file__).parents[1] / "resources"


def names_in(folder: str, suffix: str = ".yaml") -> list[str]:
    """Names, without suffix, of the files in one of the project's folders."""
    return sorted(file.stem for file in (ROOT / folder).glob(f"*{suffix}"))


def find_file(name: str, folder: str, what: str, near: Path | None = None, *, suffix: str = ".yaml") -> Path:
    """Find a file by its path, or by its bare name in `near` or in the project's folder.

    Args:
        name: A path (with a "/" or the suffix), or a bare name.
        folder: The project's folder, such as "suites".
        what: "suite", "scale", ..., for the message.
        near: A folder that is searched first.
        suffix: Of the file.

    Raises:
        UnknownNameError: There is no such file; the message suggests near names.
    """
    if name.endswith(suffix) or "/" in name:
        if _is_file(path := expand(name)):
            return path
        got = "is a folder" if _is_folder(path) else "was not found"
        raise UnknownNameError(
            what, name, names_in(folder, suffix), f"; or the path of a file, but this one {got}"
        )
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
    except OSError:  # A text too long for a name.
        return False
