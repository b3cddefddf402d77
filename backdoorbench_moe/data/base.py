"""The data-set interface, and the images it gives."""

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
from backdoorbench_moe.ops.seeding import generator


@dataclass(frozen=True)
class Split:
    """images: (N, 3, H, W) uint8. labels: (N,) int64 in [0, classes)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSet:
    """A training and a test split, whole in memory as uint8.

    digest: SHA-256 over the images and labels of both splits, hex.
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
        """Side of the square images, in pixels."""
        return self.train.images.shape[-1]

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


class Dataset(ABC):
    """A source of images. Subclasses write `read`; users call `load`.

    train_images, test_images: keep this many, drawn once by a fixed seed and kept in their order; all by
    default. tiny: options that the conformance tests make it with, beside those of `write_tiny`.
    """

    tiny: ClassVar[Mapping[str, object]] = {}

    def __init__(self, *, train_images: int | None = None, test_images: int | None = None) -> None:
        for name, value in (("train_images", train_images), ("test_images", test_images)):
            if value is not None and value < 1:
                raise ConfigError.expected(f"dataset: {name}", "a positive number of images", value)
        self.train_images, self.test_images = train_images, test_images

    @final
    def load(self) -> ImageSet:
        """Read, check and return the images. Raises DataError naming the file and what is wrong with it."""
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

        The tensors must be contiguous and nobody else's: a run stamps some images in place while it trains.
        """

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes in their order, those of `load`.

        Reads all images; a subclass that knows the names without should override it.
        """
        return self.load().classes

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small set into an empty folder and return the options that read it, for the conformance tests.

        At least 12 training and 5 test images, and 2 classes. What needs no files, as here, returns nothing.
        """
        return {}


def check_split(split: Split, num_classes: int, name: str) -> None:
    """Raise DataError unless the split is (N, 3, S, S) uint8 with N labels in [0, num_classes)."""
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
    """SHA-256 over the images and labels of both splits, hex."""
    digest = hashlib.sha256()
    for split in (images.train, images.test):
        for tensor in (split.images, split.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def draw_subset(total: int, count: int | None, name: str) -> Tensor:
    """Indices of `count` of `total` images (all where None), in order; the same at every call.

    A data set that decodes files may keep these before it decodes; `load` then finds nothing to drop.
    name: "train_images" or "test_images". Raises ConfigError where there are fewer than `count`.
    """
    if count is None or count == total:
        return torch.arange(total)
    if count > total:
        raise ConfigError.expected(f"dataset: {name}", f"at most the {total} images there are", count)
    return torch.randperm(total, generator=generator(0, "subset", name))[:count].sort().values


def _subset(split: Split, count: int | None, name: str) -> Split:
    keep = draw_subset(len(split), count, name)
    return split if len(keep) == len(split) else Split(split.images[keep], split.labels[keep])
