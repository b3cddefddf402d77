"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.errors import ConfigError, DataError


def fill(folder: Path, values: range, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for value in values:
        Image.new("RGB", (20, 30), (value, 0, 0)).save(folder / f"{value:03d}.{suffix}")


def load(root: Path, **options):
    return create_dataset("folder", root=str(root), **options).load()


def reds(split) -> list[int]:
    return split.images[:, 0, 3, 3].tolist()


def test_train_and_test(tmp_path) -> None:
    fill(tmp_path / "train" / "dog", range(10, 14))
    fill(tmp_path / "train" / "cat", range(3), "bmp")
    fill(tmp_path / "test" / "dog", range(50, 52), "PPM")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    images = load(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and reds(images.train) == [
        0,
        1,
        2,
        10,
        11,
        12,
        13,
    ]
    assert images.test.labels.tolist() == [1, 1] and reds(images.test) == [50, 51]


@pytest.mark.parametrize(
    ("fraction", "cats", "dogs"), [(0.2, 2, 1), (0.5, 5, 2), (0.999, 9, 3), (0.001, 1, 1)]
)
def test_stratified_split(tmp_path, fraction, cats, dogs) -> None:
    fill(tmp_path / "cat", range(10))
    fill(tmp_path / "dog", range(100, 104))
    images = load(tmp_path, test_fraction=fraction)
    assert images.test.labels.bincount().tolist() == [cats, dogs]
    assert sorted(reds(images.train) + reds(images.test)) == [*range(10), *range(100, 104)]
    assert reds(images.test) == reds(load(tmp_path, test_fraction=fraction).test)
    assert reds(images.test)[:cats] != list(range(cats)) or cats in (1, 9)


def test_another_class_does_not_change_the_split(tmp_path) -> None:
    fill(tmp_path / "dog", range(100, 120))
    fill(tmp_path / "cat", range(10))
    before = reds(load(tmp_path).test)
    fill(tmp_path / "ant", range(200, 210))
    assert reds(load(tmp_path).test)[2:] == before


def test_large_images(tmp_path, rng) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = rng.integers(0, 256, (240 + 10 * index, 300, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.jpg")
    images = load(tmp_path, image_size=224, test_images=1)
    assert images.train.images.shape == (4, 3, 224, 224) and images.test.images.shape == (1, 3, 224, 224)


def test_links_out_of_root_are_refused_and_links_inside_are_not(tmp_path) -> None:
    root = tmp_path / "root"
    fill(root / "cat", range(3))
    fill(root / "dog", range(3))
    (root / "cat" / "again.png").symlink_to(root / "dog" / "001.png")
    assert len(load(root).train) + len(load(root).test) == 7
    fill(tmp_path / "elsewhere", range(1))
    (root / "cat" / "out.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    with pytest.raises(DataError, match=r"cat/out\.png: is a link out of"):
        load(root)
    (root / "cat" / "out.png").unlink()
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"eel/000\.png: is a link out of"):
        load(root)


def test_root_itself_may_be_a_link(tmp_path) -> None:
    fill(tmp_path / "real" / "cat", range(3))
    fill(tmp_path / "real" / "dog", range(3))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load(tmp_path / "link").digest == load(tmp_path / "real").digest


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: fill(root, range(2)), "expected class folders with images"),
        (
            lambda root: fill(root / "cat", range(1)),
            "class 'cat': expected at least 2 images to split, got 1",
        ),
        (lambda root: fill(root / "train" / "cat", range(1)), "expected both train and test, or neither"),
        (lambda root: None, "expected a folder of class folders, found none"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, build, message) -> None:
    build(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "root")


def test_classes_of_test_must_be_taught(tmp_path) -> None:
    fill(tmp_path / "train" / "cat", range(2))
    fill(tmp_path / "test" / "cats", range(2))
    with pytest.raises(DataError, match=r"test/cats: expected the classes of .*train"):
        load(tmp_path)
    (tmp_path / "test" / "cats").rename(tmp_path / "test" / "cat")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match="train/dog: expected images, found none"):
        load(tmp_path)


def test_damaged_image_and_wrong_mode_are_named(tmp_path) -> None:
    fill(tmp_path / "cat", range(4))
    (tmp_path / "cat" / "002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cat/002\.png: cannot be read as an image"):
        load(tmp_path)
    Image.new("RGBA", (4, 4)).save(tmp_path / "cat" / "002.png")
    with pytest.raises(DataError, match=r"cat/002\.png: expected .* got mode RGBA with transparent pixels"):
        load(tmp_path)


def test_options(tmp_path) -> None:
    with pytest.raises(ConfigError, match="option 'root' is required"):
        create_dataset("folder")
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="dataset: test_fraction: expected a number between 0 and 1"):
            create_dataset("folder", root=str(tmp_path), test_fraction=fraction)


def test_a_link_to_itself_is_said(tmp_path) -> None:
    fill(tmp_path / "cat", range(2))
    (tmp_path / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png: cannot be"):
        load(tmp_path)
