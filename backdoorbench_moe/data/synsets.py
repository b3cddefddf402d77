"""Code shared by ImageNet and Tiny ImageNet: folders named by WordNet synsets, such as n01440764."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from backdoorbench_moe.data.decoded import Files
from backdoorbench_moe.data.listing import LeftOut, find_images, is_hidden, list_folder
from backdoorbench_moe.errors import DataError

SYNSET = re.compile(r"n\d{8}")


def list_synsets(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; classes are numbered in this order, as in torchvision.

    Raises:
        DataError: The folder cannot be read, has no class folders, or has folders with other names.
    """
    folders, files = list_folder(folder)
    names = [path.name for path in folders if not is_hidden(path)]
    if not names:
        hint = f"; it has {len(files)} files, which belong into such folders" if files else ""
        raise DataError(f"{folder}: expected class folders named by synsets (n01440764), found none{hint}")
    for name in names:
        if SYNSET.fullmatch(name) is None:
            raise DataError(f"{folder / name}: expected class folders named by synsets (n01440764)")
    return names


def name_synsets(synsets: Sequence[str], tables: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of classes.

    A name is the first word or phrase of a synset in the table. If several classes have the same name, the synset
    follows in parentheses, as in "crane (n02012849)".

    Args:
        synsets: The synsets.
        tables: Files that may not exist, in order of preference. Each line has a synset, a space or tab, and words
            separated by commas.

    Returns:
        The names; a synset without words is its own name.

    Raises:
        DataError: The first table that exists cannot be read.
    """
    words: dict[str, str] = {}
    table = next((path for path in tables if path.is_file()), None)
    if table is not None:
        for line in read_lines(table):
            synset, _, text = line.replace("\t", " ").partition(" ")
            words[synset] = text.split(",")[0].strip()
    names = [words.get(synset) or synset for synset in synsets]
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} ({synset})"
        for name, synset in zip(names, synsets, strict=True)
    )


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file. Raises DataError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def list_classes(folder: Path, synsets: Sequence[str], root: Path, left_out: LeftOut) -> Files:
    """List the images in class folders, sorted by class and name.

    Args:
        folder: The folder that contains the class folders.
        synsets: The classes, by number.
        root: The folder of the data set, which links must not leave.
        left_out: Counts the files that are not images.

    Raises:
        DataError: A class has no folder or no images, or a link leaves the root.
    """
    files: Files = []
    for label, synset in enumerate(synsets):
        found = find_images(folder / synset, root, left_out)
        if not found:
            raise DataError(f"{folder / synset}: expected images, found none")
        files += [(path, label) for path in found]
    return files
