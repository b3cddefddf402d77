"""The interface of data sets, and the images they give."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError, DataError
from backdoorbench_moe.ops.images import Split
from backdoorbench_moe.ops.seeding import generator


@dataclass(frozen=True)
class ImageSet:
    """A training and a test split, held in memory as uint8.

    Attributes:
        name: Name of the data set.
        train: Training images.
        test: Test images.
        classes: Names of the classes; a label is a place in it.
        digest: SHA-256 over the images and labels of both splits, in hexadecimal.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    digest: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Side of the images, which are square, in pixels."""
        return self.train.images.shape[-1]

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


class Dataset(ABC):
    """A source of images. Subclasses write `read`; users call `load`.

    Args:
        train_images: Keep this many training images, drawn with a fixed seed and left in their order; all if None.
        test_images: The same for the test images.

    Attributes:
        tiny: Options that the conformance tests create it with, besides those that `write_tiny` returns.
        deviations: Conformance tests that the data set is known to fail, and why: reasons by name of the test.
    """

    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *, train_images: int | None = None, test_images: int | None = None) -> None:
        for name, value in (("train_images", train_images), ("test_images", test_images)):
            if value is not None and value < 1:
                raise ConfigError.expected(f"dataset: {name}", "a positive number of images", value)
        self.train_images, self.test_images = train_images, test_images

    @final
    def load(self) -> ImageSet:
        """Read, check and return the images.

        Raises:
            DataError: Files are missing, damaged or not what they should be; the message names the file.
            ConfigError: `train_images` or `test_images` is more than there are.
        """
        images = self.read()
        for name, split in (("train", images.train), ("test", images.test)):
            check_split(split, len(images.classes), f"{images.name} {name}")
        images = replace(
            images,
            train=_subset(images.train, self.train_images, "train_images"),
            test=_subset(images.test, self.test_images, "test_images"),
        )
        return replace(images, digest=content_digest(images))

    @abstractmethod
    def read(self) -> ImageSet:
        """Read the images; `load` checks them and computes the digest.

        The tensors must be contiguous and must not be shared with anything else, because a run stamps some of the
        images in place while it trains.
        """

    def source(self) -> Path | None:
        """The folder or file that the images are read from; None for a set without files, or if it is not there."""
        return None

    @final
    def fingerprint(self) -> str | None:
        """A cheap sign of whether the files have changed: SHA-256 over their names, sizes and times of change.

        It covers every file in the `source`, whether it is read or not, and not their content: a change that keeps
        size and time is not noticed, and a copied folder has another fingerprint. None without a source.
        """
        source = self.source()
        return None if source is None else fingerprint_of(source)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes in their order, those of `load`.

        Reads all images; a subclass that knows the names without should override it.
        """
        return self.load().classes

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set into an empty folder, for the conformance tests, and return the options that read it.

        It must have at least 12 training images, 5 test images and 2 classes. A data set that needs no files, as this
        default assumes, returns no options.
        """
        return {}


def fingerprint_of(source: Path) -> str:
    """SHA-256, hex, over the names, sizes and times of change of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.relative_to(source)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def check_split(split: Split, num_classes: int, name: str) -> None:
    """Check that a split holds (N, 3, S, S) uint8 images, N of them at least 1, and N labels in [0, num_classes).

    Raises:
        DataError: It does not; the message begins with `name`.
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
    """Return the SHA-256 over the images and labels of both splits, in hexadecimal."""
    digest = hashlib.sha256()
    for split in (images.train, images.test):
        for tensor in (split.images, split.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def draw_subset(total: int, count: int | None, name: str) -> Tensor:
    """Draw `count` of `total` images; the same at every call.

    A data set that decodes files can draw before it decodes; `load` then has nothing left to drop.

    Args:
        total: Number of images.
        count: How many to keep; all if None.
        name: "train_images" or "test_images".

    Returns:
        (count,) int64, indices in ascending order.

    Raises:
        ConfigError: There are fewer than `count`.
    """
    if count is None or count == total:
        return torch.arange(total)
    if count > total:
        raise ConfigError.expected(f"dataset: {name}", f"at most the {total} images there are", count)
    return torch.randperm(total, generator=generator(0, "subset", name))[:count].sort().values


def _subset(split: Split, count: int | None, name: str) -> Split:
    keep = draw_subset(len(split), count, name)
    return split if len(keep) == len(split) else Split(split.images[keep], split.labels[keep])
