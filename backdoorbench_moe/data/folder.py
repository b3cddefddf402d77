"""The data set `folder`: images in one subfolder for each class."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.decoded import Files, read_split, with_digest
from backdoorbench_moe.data.images import Form, check_image_size
from backdoorbench_moe.data.listing import LeftOut, find_images, is_hidden, list_folder, order_classes
from backdoorbench_moe.data.roots import data_root
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError
from backdoorbench_moe.ops.seeding import generator

# Names of the folders of a split, in lower case; case is ignored. Each tuple is a group of equivalent names. The first
# group that contains the name of a folder is used.
TRAIN_NAMES = (("train", "training"),)
TEST_NAMES = (("test", "testing"), ("val", "valid", "validation"))


@dataclass(frozen=True)
class Layout:
    """Location of the class folders.

    Attributes:
        root: The folder of the data set.
        train: The folder that contains the class folders for training; `root` if the data set has no test folder.
        test: The folder that contains the class folders for testing; None if the data set has none.
        classes: Names of the classes, by number.
    """

    root: Path
    train: Path
    test: Path | None
    classes: tuple[str, ...]


class Folder(Dataset):
    """Images in one folder for each class, of any size and in any format that Pillow decodes.

    The folder contains either `train/<class>/...` and `test/<class>/...`, or only `<class>/...`. In the second case the
    images of each class are split into training and test images.

    `train` may also be called `training`, and `test` may be called `testing`, or, if there is no such folder, `val`,
    `valid` or `validation`. Case is ignored. If only one of the two folders exists, it is an error, unless this folder
    has no subfolders and there are other folders; then it is a class.

    Classes are numbered in the order of their folder names: by value if all names are numbers (2 before 10), otherwise
    alphabetically. Images can be at any depth in their class folder.

    Files that are not images are skipped, and a warning counts them by suffix. Files of operating systems and notebooks
    (`.DS_Store`, `Thumbs.db`, `__MACOSX`, `.ipynb_checkpoints`, ...) are skipped silently. A link to an image or folder
    outside the data set's folder is an error.

    Images are rotated by their EXIF orientation. Only the first frame or page of a file is read; a warning counts files
    with several. Grayscale and palette images are converted to RGB without loss. Images that cannot be
    converted exactly are an error: those with more than 8 bits per channel, CMYK images, and images with transparent
    pixels.

    Decoded images are cached on disk, see `data.decoded`. If they are larger than $BBMOE_MEMORY (500MB by default),
    batches are read from the cache, otherwise all images are kept in memory.

    Args:
        root: Path of the folder.
        image_size: Side of the square images in pixels, 1 to 8192. Images are resized so that the shorter side has
            this size (bilinear, antialiased), then center-cropped.
        test_fraction: Share of each class that is used for testing if there is no test folder, in (0, 1). The split is
            deterministic, and both parts have at least one image of each class.
        train_images: Number of training images to keep, at least 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, at least 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.
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
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_folder

        write_folder(folder)
        return {"root": str(folder)}

    def source(self) -> Path | None:
        """Return the path of the folder, or None if it does not exist."""
        root = data_root(self.root)
        return root if root.is_dir() else None

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, by number, without reading images. Raises DataError if there are none."""
        left_out = LeftOut()
        layout = _find_layout(data_root(self.root), left_out)
        if not layout.classes:
            raise _no_images(layout.train, left_out)
        return layout.classes

    def read(self) -> ImageSet:
        """List the files and decode those that are kept.

        Raises:
            ConfigError: There are fewer images than `train_images` or `test_images`.
            DataError: The layout is ambiguous, a class has too few images, or a file cannot be read. The message names
                the file or folder.
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
        form = Form(self.image_size, crop=True)
        return with_digest(
            ImageSet(
                "folder",
                read_split(train, form, self.train_images, "train_images"),
                read_split(test, form, self.test_images, "test_images"),
                layout.classes,
            )
        )

    def _divide(self, files: Files, classes: tuple[str, ...]) -> tuple[Files, Files]:
        """Split each class at random into training and test files; the order is not changed."""
        by_class: list[list[Path]] = [[] for _ in classes]
        for path, label in files:
            by_class[label].append(path)
        test: set[Path] = set()
        for name, paths in zip(classes, by_class, strict=True):
            if len(paths) < 2:
                raise DataError(
                    f"folder: class {name!r}: expected at least 2 images to split, got {len(paths)}"
                )
            count = min(max(round(self.test_fraction * len(paths)), 1), len(paths) - 1)
            order = torch.randperm(len(paths), generator=generator(0, "split", name)).tolist()
            test.update(paths[index] for index in order[:count])
        return [pair for pair in files if pair[0] not in test], [pair for pair in files if pair[0] in test]


def _find_layout(root: Path, left_out: LeftOut) -> Layout:
    """Find the class folders, and count the files outside them in `left_out`.

    Raises:
        DataError: The root does not exist, or the class folders are ambiguous.
    """
    if not root.is_dir():
        found = "it is a file" if root.exists() else "it does not exist"
        raise DataError(f"--data-root (root=) {root}: expected a folder of class folders, but {found}")
    train, test = (_find_split(root, names) for names in (TRAIN_NAMES, TEST_NAMES))
    one = train or test
    if one is not None and (train is None or test is None):
        if list_folder(one)[0] or len(list_folder(root)[0]) == 1:
            raise DataError(
                f"folder: {root}: expected both train and test, or neither; found only {one.name}"
            )
        train = test = None  # A folder without subfolders, next to others, is a class with this name.
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
    """Find the folder of a split by its name.

    Args:
        root: The folder that contains it.
        choices: Groups of names, in order of preference; see `TRAIN_NAMES`.

    Returns:
        The folder with a name in the first possible group; None if there is none.

    Raises:
        DataError: Several folders have names in this group.
    """
    for names in choices:
        found = [path for path in list_folder(root)[0] if path.name.casefold() in names]
        if len(found) > 1:
            both = " and ".join(path.name for path in found)
            raise DataError(f"folder: {root}: expected one of {', '.join(names)}, found {both}")
        if found:
            return found[0]
    return None


def _class_folders(folder: Path, left_out: LeftOut) -> list[Path]:
    """List the subfolders that are not hidden, and count all other files in `left_out`."""
    folders, files = list_folder(folder)
    for path in files:
        left_out.add_file(path)
    for path in filter(is_hidden, folders):
        left_out.add_hidden_folder(path)
    return [path for path in folders if not is_hidden(path)]


def _list_images(layout: Layout, folder: Path, left_out: LeftOut) -> Files:
    """List the images in class folders with their class numbers, sorted by class, folder and name.

    Raises:
        DataError: There are none.
    """
    files = [
        (path, label)
        for label, name in enumerate(layout.classes)
        if (folder / name).is_dir()
        for path in find_images(folder / name, layout.root, left_out)
    ]
    if not files:
        raise _no_images(folder, left_out)
    return files


def _no_images(folder: Path, left_out: LeftOut) -> DataError:
    found = f" ({left_out})" if str(left_out) else ""
    return DataError(f"--data-root (root=) {folder}: expected class folders with images, found none{found}")


def _warn_of_choices(layout: Layout) -> None:
    """Warn if classes are sorted by value, validation images are used for testing, or folders are not read."""
    says = []
    if list(layout.classes) != sorted(layout.classes):
        says.append("all class folders have numbers as names and are sorted by value (2 before 10)")
    if layout.test is not None:
        read = (layout.train.name, layout.test.name)
        if layout.test.name.casefold() not in TEST_NAMES[0]:
            says.append(f"the test images are those of {layout.test.name}")
        others = [path.name for path in list_folder(layout.root)[0] if path.name not in read]
        if others:
            says.append(f"only {read[0]} and {read[1]} are read, not {', '.join(others)}")
    for text in says:
        warnings.warn(f"folder: {layout.root}: {text}", BbmoeWarning, stacklevel=3)
