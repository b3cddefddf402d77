"""What every data set keeps to, whoever wrote it; published ones by small files in their own layouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.data import create_dataset, list_datasets, signs
from backdoorbench_moe.data.base import Dataset, ImageSet, check_split
from backdoorbench_moe.errors import ConfigError, UnknownNameError

KEPT = {"train_images": 12, "test_images": 5}
name = pytest.mark.parametrize("name", list_datasets())


def pixels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, np.uint8)


def write_cifar10(root: Path, rng: np.random.Generator) -> None:
    """The published binary form: a label, then 3072 pixels."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    for file in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        labels = np.arange(10, dtype=np.uint8)[:, None]
        (folder / f"{file}.bin").write_bytes(np.hstack((labels, pixels(rng, 10, 3072))).tobytes())


def write_gtsrb(root: Path, rng: np.random.Generator) -> None:
    """The published layout: a folder and a CSV for each class, one of each for all test images."""
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"

    def put(folder: Path, csv: Path, labels: list[int]) -> None:
        folder.mkdir(parents=True)
        for index in range(len(labels)):
            Image.fromarray(pixels(rng, 20 + index, 25, 3)).save(folder / f"{index:05d}.ppm")
        rows = [f"{index:05d}.ppm;25;25;0;0;24;24;{label}" for index, label in enumerate(labels)]
        csv.write_text("\n".join([header, *rows]) + "\n")

    for label in (0, 14):
        folder = root / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}"
        put(folder, folder / f"GT-{label:05d}.csv", [label] * 10)
    tests = root / "GTSRB" / "Final_Test" / "Images"
    put(tests, root / "GTSRB" / "GT-final_test.csv", [0, 14] * 4)


def write_folder(root: Path, rng: np.random.Generator) -> None:
    for kind in ("cat", "dog"):
        (root / kind).mkdir()
        for index in range(20):
            Image.fromarray(pixels(rng, 24, 20 + index, 3)).save(root / kind / f"{index}.png")


WRITERS = {"cifar10": write_cifar10, "gtsrb": write_gtsrb, "folder": write_folder}
NEEDS_NO_FILES = ("signs",)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for each data set that reads files; `signs` draws fewer, which takes no seconds."""
    base = tmp_path_factory.mktemp("data")
    for kind, write in WRITERS.items():
        (base / kind).mkdir()
        write(base / kind, np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signs, "TRAIN_IMAGES", 200)
        patch.setattr(signs, "TEST_IMAGES", 100)
        yield base


def create(name: str, root: Path, **options: object) -> Dataset:
    if name not in WRITERS and name not in NEEDS_NO_FILES:
        pytest.skip(f"{name}: a third party's data set; this test cannot write files for it")
    return create_dataset(name, **({"root": str(root / name)} if name in WRITERS else {}), **options)


@functools.cache
def loaded(name: str, root: Path) -> ImageSet:
    """The whole set; read once."""
    return create(name, root).load()


@name
def test_both_splits_are_valid(name: str, root: Path) -> None:
    images = loaded(name, root)
    assert images.name == name
    assert len(images.classes) == len(set(images.classes)) >= 2 and all(images.classes)
    for split in (images.train, images.test):
        check_split(split, images.num_classes, name)
        assert split.images.shape[1:] == (3, images.image_size, images.image_size)
        assert split.images.device.type == "cpu" and split.images.float().std() > 1
        assert len(split.labels.unique()) >= 2


@functools.cache
def kept(name: str, root: Path) -> ImageSet:
    """A few images of the set."""
    return create(name, root, **KEPT).load()


@name
def test_a_limit_keeps_as_many_and_the_same_at_every_load(name: str, root: Path) -> None:
    first, again, whole = kept(name, root), create(name, root, **KEPT).load(), loaded(name, root)
    assert first.digest == again.digest and len(first.digest) == 64
    assert first.digest != whole.digest and first.classes == whole.classes
    for part, same, full, count in (
        (first.train, again.train, whole.train, 12),
        (first.test, again.test, whole.test, 5),
    ):
        assert len(part) == count
        assert torch.equal(part.images, same.images) and torch.equal(part.labels, same.labels)
        # Each kept image is one of the set, with its label, in the set's order.
        places = [int((full.images == image).flatten(1).all(1).nonzero()[0]) for image in part.images]
        assert places == sorted(places) and torch.equal(full.labels[places], part.labels)


@name
def test_image_size(name: str, root: Path) -> None:
    images = create(name, root, image_size=16, **KEPT).load()
    assert images.image_size == 16 and images.test.images.shape == (5, 3, 16, 16)
    assert images.digest != kept(name, root).digest
    assert torch.equal(images.train.labels, kept(name, root).train.labels)


@name
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"no_such_option": 1}, UnknownNameError, "no_such_option"),
        ({"train_image": 5}, UnknownNameError, "did you mean 'train_images'"),
        ({"train_images": 0}, ConfigError, "train_images: expected a positive number of images, got 0"),
        ({"test_images": "many"}, ConfigError, "test_images: expected an integer or none, got 'many'"),
        ({"image_size": 0}, ConfigError, "image_size: expected"),
        ({"image_size": 31.5}, ConfigError, "image_size: expected"),
    ],
)
def test_wrong_options_are_refused(name: str, root: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        create(name, root, **options)


@name
def test_more_images_than_there_are_are_refused(name: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_images: expected at most the \d+ images there are"):
        create(name, root, train_images=10**6).load()
