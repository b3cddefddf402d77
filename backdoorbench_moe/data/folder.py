"""Any folder of class folders."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from backdoorbench_moe.data.base import Dataset, ImageSet, Split, draw_subset
from backdoorbench_moe.data.images import check_image_size, read_images
from backdoorbench_moe.data.listing import LeftOut, find_images, list_folder, order_classes
from backdoorbench_moe.data.roots import data_root
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError
from backdoorbench_moe.ops.seeding import generator

Files = list[tuple[Path, int]]
# In any case. Of the test folder's names, the first that is there counts.
TRAIN_NAMES = (("train", "training"),)
TEST_NAMES = (("test", "testing"), ("val", "valid", "validation"))


@dataclass(frozen=True)
class Layout:
    """Where the class folders lie.

    Attributes:
        root: The folder that was named.
        train: Holds the training images' class folders; `root` itself if there is no split.
        test: Holds the test images' class folders; None if there is no split.
        classes: Names of the classes, by number.
    """

    root: Path
    train: Path
    test: Path | None
    classes: tuple[str, ...]


class Folder(Dataset):
    """Images in one folder for each class, of any size and in any format that Pillow decodes.

    The folder holds `train/<class>/...` and `test/<class>/...`, or `<class>/...`, which is then split. The names are
    taken in any case, `training`, `testing`, `val`, `valid` and `validation` too; a validation folder is the test set
    only if there is no test folder. Classes are numbered by the names of their folders: by value if all are numbers
    (2 before 10), otherwise as text. Images lie in a class folder or at any depth below it. Files that are no images
    are left out, and a warning counts them by suffix; what operating systems and notebooks leave behind (`.DS_Store`,
    `Thumbs.db`, `__MACOSX`, `.ipynb_checkpoints`, ...) is passed over. A link that leads out of the folder is an error.

    Images are turned upright as their EXIF orientation says. Of a file with several frames or pages the first is
    read, and a warning counts such files. Grey and palette images become RGB, which loses nothing. Images of more than
    8 bits a channel, CMYK images and those with transparent pixels have no exact 8-bit RGB form and are refused.

    Args:
        root: The folder.
        test_fraction: Share of each class that is kept for the test, in (0, 1); the same images at every call, at
            least one of each class on either side. Without effect if there is a training and a test folder.
        image_size: The shorter side becomes this many pixels (bilinear, antialiased), then the middle is cut out.
        train_images: Keep this many training images, as in `Dataset`.
        test_images: Keep this many test images, as in `Dataset`.
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

    def source(self) -> Path | None:
        """The folder."""
        root = data_root(self.root)
        return root if root.is_dir() else None

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class folders, by number; reads no image."""
        return _find_layout(data_root(self.root), LeftOut()).classes

    def read(self) -> ImageSet:
        """List and decode the files.

        Raises:
            DataError: The message names the file or folder and what is wrong with it.
        """
        left_out = LeftOut()
        layout = _find_layout(data_root(self.root), left_out)
        train = _list_images(layout, layout.train, left_out)
        if layout.test is None:
            train, test = self._divide(train, layout.classes)
        else:
            test = _list_images(layout, layout.test, left_out)
            if untaught := set(range(len(layout.classes))) - {label for _, label in train}:
                raise DataError(
                    f"{layout.train / layout.classes[min(untaught)]}: expected images, found none"
                )
        _warn_of_choices(layout)
        left_out.warn(f"folder: {layout.root}")
        return ImageSet(
            "folder",
            self._read(train, self.train_images, "train_images"),
            self._read(test, self.test_images, "test_images"),
            layout.classes,
        )

    def _divide(self, files: Files, classes: tuple[str, ...]) -> tuple[Files, Files]:
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


def _find_layout(root: Path, left_out: LeftOut) -> Layout:
    """Find the class folders. Raises DataError if there are none, or the layout is not clear."""
    if not root.is_dir():
        raise DataError(f"folder: {root}: expected a folder of class folders, found none")
    train, test = (_find_split(root, names) for names in (TRAIN_NAMES, TEST_NAMES))
    one = train or test
    if one is not None and (train is None or test is None):
        raise DataError(f"folder: {root}: expected both train and test, or neither; found only {one.name}")
    base = train or root
    classes = order_classes(path.name for path in _class_folders(base, left_out))
    if test is not None:
        for path in _class_folders(test, left_out):
            if path.name not in classes:
                raise DataError(f"{path}: expected the classes of {base}, which has no such folder")
        for path in list_folder(root)[1]:
            left_out.add_file(path)
    return Layout(root, base, test, tuple(classes))


def _find_split(root: Path, choices: tuple[tuple[str, ...], ...]) -> Path | None:
    """The folder of one split; of the first choice that is there. Raises DataError if two folders fit it."""
    for names in choices:
        found = [path for path in list_folder(root)[0] if path.name.casefold() in names]
        if len(found) > 1:
            both = " and ".join(path.name for path in found)
            raise DataError(f"folder: {root}: expected one of {', '.join(names)}, found {both}")
        if found:
            return found[0]
    return None


def _class_folders(folder: Path, left_out: LeftOut) -> list[Path]:
    folders, files = list_folder(folder)
    for path in files:
        left_out.add_file(path)
    return [path for path in folders if not path.name.startswith(".")]


def _list_images(layout: Layout, folder: Path, left_out: LeftOut) -> Files:
    """The images of every class, by class, folder and name. Raises DataError if there are none."""
    files = [
        (path, label)
        for label, name in enumerate(layout.classes)
        if (folder / name).is_dir()
        for path in find_images(folder / name, layout.root, left_out)
    ]
    if not files:
        found = f" ({left_out})" if str(left_out) else ""
        raise DataError(f"{folder}: expected class folders with images, found none{found}")
    return files


def _warn_of_choices(layout: Layout) -> None:
    """Say what a user could have meant otherwise: the order of numbers, and folders beside those that are read."""
    says = []
    if list(layout.classes) != sorted(layout.classes):
        says.append("all class folders are numbers and sorted as such (2 before 10)")
    if layout.test is not None:
        read = (layout.train.name, layout.test.name)
        if layout.test.name.casefold() not in TEST_NAMES[0]:
            says.append(f"the test images are those of {layout.test.name}")
        others = [path.name for path in list_folder(layout.root)[0] if path.name not in read]
        if others:
            says.append(f"only {read[0]} and {read[1]} are read, not {', '.join(others)}")
    for text in says:
        warnings.warn(f"folder: {layout.root}: {text}", BbmoeWarning, stacklevel=3)
