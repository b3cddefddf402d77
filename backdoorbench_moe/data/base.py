"""The interface of data sets, and the images they load. For texts see `data.text`."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import generator

# Images read at a time for the digest. The digest does not depend on it.
DIGEST_PART = 500
# Number of classes that a one-line message names.
SHOWN_CLASSES = 20


class Material(ABC):
    """The contents of a data set: an `ImageSet`, or a `data.text.TextSet`.

    Attributes:
        name: Name of the data set.
        train: Training images and their labels, or texts.
        test: Test images and their labels, or texts.
        digest: SHA-256 of all contents, in hexadecimal.
    """

    name: str
    train: Split
    test: Split
    digest: str

    @property
    @abstractmethod
    def model_options(self) -> dict[str, int]:
        """Options of a model that the data determine, by keyword argument."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the description of the data for records; see `records.record.DataFacts`."""

    @abstractmethod
    def describe(self) -> str:
        """Return a one-line description of the data."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Return the same data on another device."""


@dataclass(frozen=True)
class ImageSet(Material):
    """The images of a data set, as uint8: in memory, or `StoredImages` if they exceed the memory limit.

    Attributes:
        name: Name of the data set.
        train: Training images and their labels.
        test: Test images and their labels.
        classes: Names of the classes, by number.
        digest: SHA-256 of the images and labels of both splits, in hexadecimal.
        policy: Whether the last class is "reject", which a policy adds to the classes of the data.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digest: str = ""
    policy: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes that a model distinguishes."""
        return len(self.classes)

    @property
    def data_classes(self) -> int:
        """Number of classes of the data, from which attackers choose."""
        return self.num_classes - self.policy

    @property
    def image_size(self) -> int:
        """Side of the images, which are square, in pixels."""
        return self.train.images.shape[-1]

    @property
    def model_options(self) -> dict[str, int]:
        """Number of classes and side of the images."""
        return {"num_classes": self.num_classes, "image_size": self.image_size}

    def facts(self) -> dict[str, Any]:
        """Return the description of the data for records; see `records.record.DataFacts`."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "image_size": self.image_size,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "digest": self.digest,
        }

    def describe(self) -> str:
        """Return the classes with their numbers in one line."""
        return describe_classes(self.classes)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same images on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def describe_classes(classes: Sequence[str]) -> str:
    """Return the classes with their numbers in one line, "2 classes: 0 (cat), 1 (dog)"; at most `SHOWN_CLASSES`."""
    shown = [f"{number} ({name})" for number, name in enumerate(classes[:SHOWN_CLASSES])]
    more = len(classes) - len(shown)
    return f"{len(classes)} classes: {', '.join(shown)}" + (f", and {more} more" if more else "")


class DataSource(ABC):
    """Base class of data sets: of images (`Dataset`), or of texts (`data.text.TextDataset`).

    Attributes:
        implies: Default settings of a run on these data, such as a model.
        tiny: Options for the conformance tests, in addition to those that `write_tiny` returns.
        deviations: Conformance tests that the data set is known to fail: reasons by name of the test.
    """

    implies: ClassVar[Mapping[str, Any]] = {}
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def load(self) -> Material:
        """Read, check and return the data.

        Raises:
            DataError: Files are missing, damaged or in another format; the message names the file.
        """

    def source(self) -> Path | None:
        """Return the folder or file that the data are read from; None if there is none."""
        return None

    def files_beside(self) -> tuple[Path, ...]:
        """Return the files outside `source` that are also read; none by default."""
        return ()

    @final
    def fingerprint(self) -> str | None:
        """Return a hash that changes with the files: SHA-256 of their names, sizes and modification times.

        No file is opened, so this is fast. The hash covers `files_beside` and every file in `source`, including files
        that are not read. Contents are not hashed: a change that keeps size and modification time is not detected, and
        a copied folder has a different fingerprint.

        Returns:
            The hash in hexadecimal; None if there is no source.
        """
        source = self.source()
        return None if source is None else fingerprint_of(source, *self.files_beside())

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, by number; empty for texts."""

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests.

        It must have at least 12 training images, 5 test images and 2 classes. Data sets that read files override
        this method; the default writes nothing.

        Args:
            folder: An empty folder.

        Returns:
            The options with which the data set is read.
        """
        return {}


class Dataset(DataSource):
    """A source of images. Subclasses implement `read`; users call `load`.

    Args:
        train_images: Number of training images to keep; all if None. They are drawn with a fixed seed and keep their
            order.
        test_images: Number of test images to keep, drawn in the same way.
    """

    def __init__(self, *, train_images: int | None = None, test_images: int | None = None) -> None:
        for name, value in (("train_images", train_images), ("test_images", test_images)):
            if value is not None and value < 1:
                raise ConfigError.expected(f"dataset: {name}", "a positive number of images", value)
        self.train_images, self.test_images = train_images, test_images

    @final
    def load(self) -> ImageSet:
        """Read, check and return the images.

        Raises:
            DataError: Files are missing, damaged or in another format; the message names the file.
            ConfigError: The data set has fewer than `train_images` or `test_images` images.
        """
        images = self.read()
        for name, split in (("train", images.train), ("test", images.test)):
            check_split(split, len(images.classes), f"{images.name} {name}")
        train = _subset(images.train, self.train_images, "train_images")
        test = _subset(images.test, self.test_images, "test_images")
        if train is not images.train or test is not images.test:
            images = replace(images, train=train, test=test, digest="")
        return images if images.digest else replace(images, digest=content_digest(images))

    @abstractmethod
    def read(self) -> ImageSet:
        """Read the images. `load` checks them, draws the images to keep, and computes the digest.

        The tensors must be contiguous and must not share memory with other tensors, because a run modifies some of the
        images in place. Images that do not fit into memory can be `ops.stored_images.StoredImages`. The digest is the
        result of `content_digest`, or empty.
        """

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, by number, as in the result of `load`.

        The default reads all images. Subclasses that know the names without reading images should override it.
        """
        return self.load().classes


def as_images(material: Material) -> ImageSet:
    """Return the data if they are images. Raises ConfigError for texts."""
    if not isinstance(material, ImageSet):
        raise ConfigError.expected(
            "dataset", "images, which this needs", f"{material.name}, which holds texts"
        )
    return material


def fingerprint_of(*sources: Path) -> str:
    """Return the SHA-256 of the names, sizes and modification times of files, and of all files in folders."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                facts = path.stat()
                # Names of files need not be valid UTF-8.
                digest.update(os.fsencode(path.relative_to(source)))
                digest.update(f"\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_split(split: Split, num_classes: int, name: str) -> None:
    """Check the images and labels of a split.

    Args:
        split: Expected to hold contiguous images (N, 3, S, S) uint8 with N > 0, and labels (N,) int64.
        num_classes: Number of classes; labels must be below it.
        name: Name of the split, the beginning of error messages.

    Raises:
        DataError: The split has another format.
    """
    shape = tuple(split.images.shape)
    if split.images.dtype != torch.uint8 or split.images.ndim != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise DataError(
            f"{name}: expected square uint8 images (N, 3, S, S), got {split.images.dtype} {shape}"
        )
    if not split.images.is_contiguous():
        raise DataError(f"{name}: expected contiguous images, got strides {split.images.stride()}")
    if not len(split) or tuple(split.labels.shape) != shape[:1] or split.labels.dtype != torch.int64:
        raise DataError(
            f"{name}: expected one int64 label for each of {shape[0]} images, "
            f"got {split.labels.dtype} {tuple(split.labels.shape)}"
        )
    low, high = (int(value) for value in torch.aminmax(split.labels))
    if low < 0 or high >= num_classes:
        raise DataError(f"{name}: expected labels in 0..{num_classes - 1}, got {low}..{high}")


def content_digest(images: ImageSet) -> str:
    """Return the SHA-256 of the images and labels of both splits, in hexadecimal."""
    return digest_of((images.train, images.test))


def digest_of(splits: Iterable[Split]) -> str:
    """Return the SHA-256 of the images and labels, or texts, of several splits, in hexadecimal."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            for part in tensor.split(DIGEST_PART):
                digest.update(part.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def draw_subset(total: int, count: int | None, name: str) -> Tensor:
    """Draw the images of a split that are kept; every call returns the same indices.

    Data sets that decode files can call this first and decode only the images that are kept.

    Args:
        total: Number of images.
        count: Number of images to keep; all if None.
        name: The option with this number, "train_images" or "test_images". The draw depends on it.

    Returns:
        (count,) int64, indices in ascending order.

    Raises:
        ConfigError: There are fewer than `count` images.
    """
    if count is None or count == total:
        return torch.arange(total)
    if count > total:
        raise ConfigError.expected(f"dataset: {name}", f"at most the {total} images there are", count)
    return torch.randperm(total, generator=generator(0, "subset", name))[:count].sort().values


def _subset(split: Split, count: int | None, name: str) -> Split:
    keep = draw_subset(len(split), count, name)
    return split if len(keep) == len(split) else Split(split.images[keep], split.labels[keep])
