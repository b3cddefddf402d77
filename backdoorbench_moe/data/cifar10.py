"""The CIFAR-10 data set, in either of the two formats that it is published in."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorbench_moe.data.base import Dataset, ImageSet, Split
from backdoorbench_moe.data.images import check_image_size, subset_and_resize
from backdoorbench_moe.data.roots import data_root, download, missing
from backdoorbench_moe.data.safe_pickle import read_pickle
from backdoorbench_moe.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
TRAIN_FILES, TEST_FILE = tuple(f"data_batch_{part}" for part in range(1, 6)), "test_batch"
# Name of the folder inside the archive, name of the archive, and suffix of the files.
PYTHON_FORM = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "")
BINARY_FORM = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin")
# The published files are 31 MB each.
MAX_MEMBER_BYTES = 64 << 20

Rows = tuple[np.ndarray, np.ndarray]


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
        train, test = _split([rows[name] for name in TRAIN_FILES]), _split([rows[TEST_FILE]])
        return ImageSet(
            "cifar10",
            subset_and_resize(train, self.train_images, "train_images", self.image_size),
            subset_and_resize(test, self.test_images, "test_images", self.image_size),
            CLASSES,
        )


def _split(rows: list[Rows]) -> Split:
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in rows]).reshape(-1, 3, SIDE, SIDE))
    return Split(images, torch.from_numpy(np.concatenate([labels for _, labels in rows])))


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
                try:
                    data = path.read_bytes()
                except OSError as error:
                    raise DataError(f"{path}: cannot be read ({error})") from error
                yield name, _parser(suffix)(data, str(path))
            return


def _read_archive(path: Path) -> Iterator[tuple[str, Rows]]:
    """Read the six files of an archive by their exact names, in one pass. Nothing is written to disk."""
    wanted = {
        f"{folder}/{name}{suffix}": (name, suffix)
        for folder, _, suffix in (PYTHON_FORM, BINARY_FORM)
        for name in (*TRAIN_FILES, TEST_FILE)
    }
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name, suffix = wanted.get(member.name.removeprefix("./"), ("", ""))
                if name:
                    yield (
                        name,
                        _parser(suffix)(_member_bytes(archive, member, path), f"{path}: {member.name}"),
                    )
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: expected CIFAR-10's archive, cannot read it ({error})") from error


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    file = archive.extractfile(member) if member.isreg() and member.size <= MAX_MEMBER_BYTES else None
    if file is None:
        raise DataError(f"{path}: {member.name}: expected a plain file of at most {MAX_MEMBER_BYTES} bytes")
    return file.read()


def _parser(suffix: str) -> Callable[[bytes, str], Rows]:
    return _parse_binary if suffix else _parse_pickle


def _parse_pickle(data: bytes, name: str) -> Rows:
    content: dict[str, Any] = read_pickle(data, name)
    pixels, labels = content.get("data"), content.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        got = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{name}: data: expected bytes (N, {PIXELS}), got {got}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise DataError(f"{name}: labels: expected a list of integers, got {type(labels).__name__}")
    if any(abs(label) > 255 for label in labels):  # They might not fit into int64.
        raise DataError(f"{name}: labels: expected numbers in 0..{len(CLASSES) - 1}, got larger ones")
    return _check(pixels, np.array(labels, np.int64), name)


def _parse_binary(data: bytes, name: str) -> Rows:
    if not data or len(data) % (1 + PIXELS):
        raise DataError(f"{name}: expected rows of {1 + PIXELS} bytes, got {len(data)} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _check(rows[:, 1:], rows[:, 0].astype(np.int64), name)


def _check(pixels: np.ndarray, labels: np.ndarray, name: str) -> Rows:
    if len(labels) != len(pixels):
        raise DataError(f"{name}: expected a label for each of {len(pixels)} images, got {len(labels)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DataError(
            f"{name}: expected labels in 0..{len(CLASSES) - 1}, got {labels.min()}..{labels.max()}"
        )
    return pixels, labels
