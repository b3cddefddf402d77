"""Conformance tests of data sets of images. Those that read files are tested on small files from `write_tiny`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from backdoorbench_moe.data.base import Dataset, ImageSet, check_split
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.testing.making import make

KEPT = {"train_images": 12, "test_images": 5}


@pytest.fixture(scope="session")
def root(dataset_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the files of the data set."""
    return tmp_path_factory.mktemp("data")


@functools.cache
def written(name: str, root: Path) -> dict[str, object]:
    """Let the data set write its files, and return the options for reading them."""
    return REGISTRIES["dataset"].lookup(name).write_tiny(root)


def create(name: str, root: Path, **options: Any) -> Dataset:
    return make("dataset", name, **{**written(name, root), **options})


@functools.cache
def loaded(name: str, root: Path) -> ImageSet:
    """Return the complete data set, which is read once."""
    return create(name, root).load()


def test_both_splits_are_valid(dataset_name: str, root: Path) -> None:
    images = loaded(dataset_name, root)
    assert images.name == dataset_name
    assert len(images.classes) == len(set(images.classes)) >= 2 and all(images.classes)
    for split in (images.train, images.test):
        check_split(split, images.num_classes, dataset_name)
        assert split.images.shape[1:] == (3, images.image_size, images.image_size)
        assert split.images.device.type == "cpu" and split.images.float().std() > 1
        assert len(split.labels.unique()) >= 2


def test_the_splits_share_no_memory(dataset_name: str, root: Path) -> None:
    """A run changes some of the training images in place, and the test images must not change with them."""
    images = loaded(dataset_name, root)
    pairs = (images.train.images, images.test.images), (images.train.labels, images.test.labels)
    for train, test in pairs:
        if isinstance(train, torch.Tensor) and isinstance(test, torch.Tensor):
            assert not overlap(train, test), "a test image or label is in the memory of a training one"


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors have elements at the same address."""
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def test_class_names_are_those_of_the_images(dataset_name: str, root: Path) -> None:
    assert create(dataset_name, root).class_names() == loaded(dataset_name, root).classes


@functools.cache
def kept(name: str, root: Path) -> ImageSet:
    """Return a few images of the data set."""
    return create(name, root, **KEPT).load()


def test_a_limit_keeps_this_number_and_the_same_images_at_every_load(dataset_name: str, root: Path) -> None:
    first, again, whole = (
        kept(dataset_name, root),
        create(dataset_name, root, **KEPT).load(),
        loaded(dataset_name, root),
    )
    assert first.digest == again.digest and len(first.digest) == 64
    assert first.digest != whole.digest and first.classes == whole.classes
    for part, same, full, count in (
        (first.train, again.train, whole.train, 12),
        (first.test, again.test, whole.test, 5),
    ):
        assert len(part) == count
        assert torch.equal(part.images, same.images) and torch.equal(part.labels, same.labels)
        # Each kept image is in the data set, with its label, in the same order.
        places = [int((full.images == image).flatten(1).all(1).nonzero()[0]) for image in part.images]
        assert places == sorted(places) and torch.equal(full.labels[places], part.labels)


def test_image_size(dataset_name: str, root: Path) -> None:
    if "image_size" not in REGISTRIES["dataset"].options(dataset_name):
        pytest.skip("no option image_size")
    images = create(dataset_name, root, image_size=16, **KEPT).load()
    assert images.image_size == 16 and images.test.images.shape == (5, 3, 16, 16)
    assert images.digest != kept(dataset_name, root).digest
    assert torch.equal(images.train.labels, kept(dataset_name, root).train.labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"no_such_option": 1}, UnknownNameError, "no_such_option"),
        ({"train_image": 5}, UnknownNameError, "did you mean 'train_images'"),
        ({"train_images": 0}, ConfigError, "train_images: expected a positive number of images, got 0"),
        ({"test_images": "many"}, ConfigError, "test_images: expected an integer or none, got 'many'"),
        ({"image_size": 0}, ConfigError, "image_size"),
        ({"image_size": 31.5}, ConfigError, "image_size"),
    ],
)
def test_wrong_options_are_refused(
    dataset_name: str, root: Path, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        create(dataset_name, root, **options)


def test_more_images_than_there_are_are_refused(dataset_name: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_images: expected at most the \d+ images there are"):
        create(dataset_name, root, train_images=10**6).load()
