"""The CIFAR-10 data set, in either of its two published formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.cifar_files import (
    PIXELS,
    SIDE,
    Rows,
    check_rows,
    parse_pickle,
    read_file,
    read_members,
    split_of,
)
from backdoorbench_moe.data.images import check_image_size, subset_and_resize
from backdoorbench_moe.data.roots import data_root, download, missing
from backdoorbench_moe.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_FILES, TEST_FILE = tuple(f"data_batch_{part}" for part in range(1, 6)), "test_batch"
# Name of the folder inside the archive, name of the archive, and suffix of the files.
PYTHON_FORM = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "")
BINARY_FORM = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin")
# The published files are 31 MB each.
MAX_MEMBER_BYTES = 64 << 20


class CIFAR10(Dataset):
    """CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 32x32 pixels.

    Archives are read without being unpacked. Files with fewer images are accepted.

    Args:
        root: The folder or archive of the "python" or the "binary" version, or a folder that contains it. By default
            the environment variable BBMOE_DATA, or ~/.cache/backdoorbench_moe if that is not set.
        download: Whether to download the published archive into `root` if nothing is found there. Its MD5 is checked.
        image_size: Side of the images in pixels, 1 to 8192. Other sizes than 32 are resized (bilinear, antialiased).
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        download: bool = False,
        image_size: int = SIDE,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.root, self.download, self.image_size = root, download, check_image_size(image_size)

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_cifar10

        write_cifar10(folder)
        return {"root": str(folder)}

    def source(self) -> Path | None:
        """Return the folder or archive that is read; None if there is none."""
        return _find(data_root(self.root))

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the ten classes; no file is read."""
        return CLASSES

    def read(self) -> ImageSet:
        """Read the six files.

        Raises:
            DataError: Files are missing or damaged, or cannot be downloaded; the message names the file.
        """
        root = data_root(self.root)
        source = _find(root)
        if source is None and self.download:
            source = download(URL, root, MD5)
        if source is None:
            names = ", ".join((*PYTHON_FORM[:2], *BINARY_FORM[:2]))
            raise missing("cifar10", root, names, ", or fetch it with --download (download=True)")
        rows = dict(_read_folder(source) if source.is_dir() else _read_archive(source))
        for name in (*TRAIN_FILES, TEST_FILE):
            if name not in rows:
                raise DataError(f"{source}: {name} is missing")
        train, test = split_of([rows[name] for name in TRAIN_FILES]), split_of([rows[TEST_FILE]])
        return ImageSet(
            "cifar10",
            subset_and_resize(train, self.train_images, "train_images", self.image_size),
            subset_and_resize(test, self.test_images, "test_images", self.image_size),
            CLASSES,
        )


def _find(root: Path) -> Path | None:
    """Return the folder or archive to read, which is `root` or in `root`; None if there is none."""
    if root.is_file():
        return root
    for folder, archive, suffix in (PYTHON_FORM, BINARY_FORM):
        if (root / f"{TEST_FILE}{suffix}").is_file() or (root / f"{TRAIN_FILES[0]}{suffix}").is_file():
            return root
        if (root / folder).is_dir():
            return root / folder
        if (root / archive).is_file():
            return root / archive
    return None


def _read_folder(folder: Path) -> Iterator[tuple[str, Rows]]:
    for _, _, suffix in (PYTHON_FORM, BINARY_FORM):
        found = [name for name in (*TRAIN_FILES, TEST_FILE) if (folder / f"{name}{suffix}").is_file()]
        if found:
            for name in found:
                path = folder / f"{name}{suffix}"
                yield name, _parser(suffix)(read_file(path), str(path))
            return


def _read_archive(path: Path) -> Iterator[tuple[str, Rows]]:
    wanted = {
        f"{folder}/{name}{suffix}": (name, suffix)
        for folder, _, suffix in (PYTHON_FORM, BINARY_FORM)
        for name in (*TRAIN_FILES, TEST_FILE)
    }
    members = read_members(path, wanted, limit=MAX_MEMBER_BYTES, what="CIFAR-10")
    for (name, suffix), data, where in members:
        yield name, _parser(suffix)(data, where)


def _parser(suffix: str) -> Callable[[bytes, str], Rows]:
    if suffix:
        return _parse_binary
    return partial(parse_pickle, labels="labels", classes=len(CLASSES))


def _parse_binary(data: bytes, name: str) -> Rows:
    if not data or len(data) % (1 + PIXELS):
        raise DataError(f"{name}: expected rows of {1 + PIXELS} bytes, got {len(data)} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return check_rows(rows[:, 1:], rows[:, 0].astype(np.int64), name, len(CLASSES))
