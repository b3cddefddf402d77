"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

import torch

from backdoorbench_moe.data.base import Dataset, ImageSet, Split, draw_subset
from backdoorbench_moe.data.images import SUFFIXES, check_image_size, read_images
from backdoorbench_moe.data.roots import data_root
from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.ops.seeding import generator

Files = list[tuple[Path, int]]


class Folder(Dataset):
    """Images in one folder for each class, of any size and in any of the formats in `images.SUFFIXES`.

    root: holds train/<class>/* and test/<class>/*, or <class>/*, which is then split. Classes are numbered
    by name. A link that leads out of root is an error.
    test_fraction: share of each class that is kept for the test, in (0, 1); the same images at every call,
    at least one of each class on either side. Of no meaning where there is a train and a test folder.
    image_size: the shorter side becomes this many pixels (bilinear, antialiased), then the middle is cut
    out.
    train_images, test_images: as in `Dataset`.

    Grey and palette images become RGB, which loses nothing. Others (CMYK, 16 bits, transparent pixels)
    have no one right RGB form and are refused.
    """

    def __init__(
        self,
        *,
        root: str,
        image_size: int = 32,
        test_fraction: float = 0.2,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        if not 0 < test_fraction < 1:
            raise ConfigError.expected("dataset: test_fraction", "a number between 0 and 1", test_fraction)
        self.root, self.image_size = root, check_image_size(image_size)
        self.test_fraction = test_fraction

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """As `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_folder

        write_folder(folder)
        return {"root": str(folder)}

    def read(self) -> ImageSet:
        """List and decode the files. Raises DataError naming the file or folder and what is wrong with it."""
        root = data_root(self.root)
        if not root.is_dir():
            raise DataError(f"folder: {root}: expected a folder of class folders, found none")
        parts = [root / "train", root / "test"]
        if all(part.is_dir() for part in parts):
            classes = [path.name for path in _folders(parts[0])]
            for path in _folders(parts[1]):
                if path.name not in classes:
                    raise DataError(f"{path}: expected the classes of {parts[0]}, which has no such folder")
            train, test = (_list(part, classes, root) for part in parts)
            if untaught := set(range(len(classes))) - {label for _, label in train}:
                raise DataError(f"{parts[0] / classes[min(untaught)]}: expected images, found none")
        elif any(part.is_dir() for part in parts):
            raise DataError(f"folder: {root}: expected both train and test, or neither")
        else:
            classes = [path.name for path in _folders(root)]
            train, test = self._divide(_list(root, classes, root), classes)
        return ImageSet(
            "folder",
            self._read(train, self.train_images, "train_images"),
            self._read(test, self.test_images, "test_images"),
            tuple(classes),
        )

    def _divide(self, files: Files, classes: list[str]) -> tuple[Files, Files]:
        test: set[Path] = set()
        for label, name in enumerate(classes):
            paths = [path for path, given in files if given == label]
            if len(paths) < 2:
                raise DataError(
                    f"folder: class {name!r}: expected at least 2 images to split, got {len(paths)}"
                )
            count = min(max(round(self.test_fraction * len(paths)), 1), len(paths) - 1)
            order = torch.randperm(len(paths), generator=generator(0, "split", name)).tolist()
            test.update(paths[index] for index in order[:count])
        return [pair for pair in files if pair[0] not in test], [pair for pair in files if pair[0] in test]

    def _read(self, files: Files, count: int | None, name: str) -> Split:
        kept = [files[index] for index in draw_subset(len(files), count, name).tolist()]
        images = read_images([path for path, _ in kept], self.image_size, crop=True)
        return Split(images, torch.tensor([label for _, label in kept], dtype=torch.int64))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list(folder: Path, classes: list[str], root: Path) -> Files:
    """The images of every class, by class and name. Raises DataError for a link that leads out of `root`."""
    home = root.resolve()
    files = [
        (path, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    for path, _ in files:
        try:
            inside = path.resolve().is_relative_to(home)
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, in older Pythons.
            raise DataError(f"{path}: cannot be followed ({error})") from error
        if not inside:
            raise DataError(f"{path}: is a link out of {root}, which is not followed")
    if not files:
        raise DataError(f"{folder}: expected class folders with images ({', '.join(SUFFIXES)}), found none")
    return files
