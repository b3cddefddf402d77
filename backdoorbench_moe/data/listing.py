"""Which files under a folder are images, and what is left out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.image_files import is_image

# What operating systems, file servers, archives and notebooks leave behind; passed over without a word.
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
# The other half of a file from macOS ("._cat.png"), which is not an image, whatever its suffix.
APPLE_DOUBLE = "._"


class LeftOut:
    """Counts the files in a folder that are not read, by type, for one warning."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add_file(self, path: Path) -> None:
        """Count a file that is not read."""
        if is_hidden(path):
            self.counts["hidden"] += 1
        elif is_image(path):
            self.counts["outside of class folders"] += 1
        else:
            self.counts[path.suffix.lower() or "without a suffix"] += 1

    def __str__(self) -> str:
        """Return such as "12 files left out: 10 .txt, 2 hidden"; empty if there is nothing to say."""
        total = self.counts.total()
        if not total:
            return ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())
        return f"{total:,} {'file' if total == 1 else 'files'} left out: {kinds}"

    def warn(self, where: str) -> None:
        """Warn of all that was counted, if anything was."""
        if text := str(self):
            warnings.warn(f"{where}: {text}", BbmoeWarning, stacklevel=3)


def is_clutter(path: Path) -> bool:
    """Return whether a file or folder belongs to an operating system or a tool, and not to the data."""
    return path.name.casefold() in CLUTTER or path.name.startswith(APPLE_DOUBLE)


def is_hidden(path: Path) -> bool:
    """Return whether the name of a file or folder begins with a dot."""
    return path.name.startswith(".")


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the files of a folder, each by name and without clutter.

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
    """Find the images of a folder at any depth, as torchvision's ImageFolder does.

    Those of a folder come by name, then those of its subfolders. Hidden files and folders are left out. Links are
    followed if they stay inside `root`.

    Raises:
        DataError: A link leads out of `root`, to itself or to a folder that holds it, or a folder cannot be read.
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
    """Every file below a folder but clutter. above: where the folders that hold this one really lie."""
    real = _follow(folder, root)
    if real in above:
        raise DataError(f"{folder}: is a link to a folder that holds it")
    folders, files = list_folder(folder)
    for path in files:
        if path.is_symlink() and is_image(path):
            _follow(path, root)
        yield path
    for path in folders:
        yield from _files_below(path, root, (*above, real))


def _follow(path: Path, root: Path) -> Path:
    """Where a file or folder really lies. Raises DataError for a link that leads out of `root`, or nowhere."""
    try:
        real, home = path.resolve(strict=True), root.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, in older Pythons.
        raise DataError(f"{path}: cannot be followed ({error})") from error
    if not real.is_relative_to(home):
        raise DataError(f"{path}: is a link out of {root}, which is not followed")
    return real


def order_classes(names: Iterable[str]) -> list[str]:
    """Sort class names: by their value if all are numbers (2 before 10), otherwise as text."""
    names = list(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
