"""Listing the images in a folder and its subfolders, and counting skipped files."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.image_files import is_image

# Files and folders of operating systems, file servers, version control and notebooks, which are skipped silently.
CLUTTER = frozenset(
    {
        "__macosx",
        ".ds_store",
        ".directory",
        ".git",
        ".ipynb_checkpoints",
        "@eadir",
        "$recycle.bin",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
# Prefix of the files in which macOS keeps metadata of another file: "._cat.png" is not an image.
APPLE_DOUBLE = "._"


class LeftOut:
    """Counts of skipped files by type, for one warning."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add_file(self, path: Path) -> None:
        """Count a skipped file: as hidden, as an image outside class folders, or by its suffix."""
        if is_hidden(path):
            self.counts["hidden"] += 1
        elif is_image(path):
            self.counts["outside of class folders"] += 1
        else:
            self.counts[path.suffix.lower() or "without a suffix"] += 1

    def add_hidden_folder(self, path: Path) -> None:
        """Count all files in a hidden folder, at any depth. Links to folders are not followed."""
        self.counts["hidden"] += sum(len(files) for _, _, files in os.walk(path))

    def __str__(self) -> str:
        """Return the counts, as in "12 files left out: 10 .txt, 2 hidden"; empty if there are none."""
        total = self.counts.total()
        if not total:
            return ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common() if count)
        return f"{total:,} {'file' if total == 1 else 'files'} left out: {kinds}"

    def warn(self, where: str) -> None:
        """Issue a warning with the counts if any file was skipped.

        Args:
            where: Beginning of the message: the data set and its folder.
        """
        if text := str(self):
            warnings.warn(f"{where}: {text}", BbmoeWarning, stacklevel=3)


def is_clutter(path: Path) -> bool:
    """Return whether a file or folder was created by an operating system or tool and is not data."""
    return path.name.casefold() in CLUTTER or path.name.startswith(APPLE_DOUBLE)


def is_hidden(path: Path) -> bool:
    """Return whether the name of a file or folder starts with a dot."""
    return path.name.startswith(".")


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the files of a folder, each sorted by name, without clutter.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not is_clutter(path))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
    folders = [path for path in paths if path.is_dir()]
    inside = set(folders)
    return folders, [path for path in paths if path not in inside]


def find_images(folder: Path, root: Path, left_out: LeftOut) -> list[Path]:
    """Find the images in a folder, at any depth.

    The images directly in a folder come first, sorted by name, and then those in its subfolders. Hidden files and
    folders are skipped. Links are followed if their targets are inside `root`.

    Args:
        folder: The folder to search.
        root: The root folder of the data set.
        left_out: Counts the skipped files.

    Raises:
        DataError: The target of a link to an image or folder is outside `root`, does not exist, or contains the link;
            or a folder cannot be read.
    """
    images = []
    for path in _files_below(folder, root, ()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            left_out.counts["hidden"] += 1
        elif is_image(path):
            images.append(path)
        else:
            left_out.add_file(path)
    return images


def _files_below(folder: Path, root: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield all files in a folder, at any depth, without clutter.

    Args:
        folder: The folder.
        root: The root folder of the data set, which links must not leave.
        above: Resolved paths of the folders that contain `folder`.
    """
    real = _follow(folder, root)
    if real in above:
        raise DataError(f"{folder}: is a link to a folder that contains it")
    folders, files = list_folder(folder)
    for path in files:
        if path.is_symlink() and is_image(path):
            _follow(path, root)
        yield path
    for path in folders:
        yield from _files_below(path, root, (*above, real))


def _follow(path: Path, root: Path) -> Path:
    """Resolve the links in a path. Raises DataError if the target is missing or outside `root`."""
    try:
        real, home = path.resolve(strict=True), root.resolve()
    # Older versions of Python raise RuntimeError for a link to itself.
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be followed ({error})") from error
    if not real.is_relative_to(home):
        raise DataError(f"{path}: is a link to a target outside {root}, which is not followed")
    return real


def order_classes(names: Iterable[str]) -> list[str]:
    """Sort class names: by value if all are numbers (2 before 10), otherwise as text."""
    names = list(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
