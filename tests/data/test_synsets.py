"""The layouts of Tiny ImageNet and ImageNet."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.synsets import name_synsets
from backdoorbench_moe.data.tiny_files import write_imagenet, write_tiny_imagenet
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError


@pytest.fixture
def tiny(tmp_path) -> Path:
    write_tiny_imagenet(tmp_path)
    return tmp_path / "tiny-imagenet-200"


@pytest.fixture
def imagenet(tmp_path) -> Path:
    write_imagenet(tmp_path)
    return tmp_path


def load(name: str, root: Path, **options):
    return create_dataset(name, root=str(root), **options).load()


def test_tiny_imagenet_is_numbered_as_by_torchvision_and_labelled_by_its_table(tiny) -> None:
    images, theirs = load("tiny-imagenet", tiny), ImageFolder(tiny / "train")
    assert images.classes == ("goldfish", "Egyptian cat") and images.image_size == 64
    assert load("tiny-imagenet", tiny.parent).digest == images.digest
    paths = [Path(path) for path, _ in theirs.samples]
    assert images.train.labels.tolist() == [label for _, label in theirs.samples] and len(paths) == 24
    for image, path in zip(images.train.images, paths, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))
    # The first image has the first synset that was written, which is the second in order.
    assert images.test.labels.tolist() == [1, 0] * 4
    first = np.asarray(Image.open(tiny / "val" / "images" / "val_0.JPEG"))
    np.testing.assert_array_equal(images.test.images[0].permute(1, 2, 0), first)


def put(path: str, text: str):
    return lambda root: (root / path).write_text(text)


def remove(path: str):
    return lambda root: (root / path).unlink() if (root / path).is_file() else shutil.rmtree(root / path)


def empty(path: str):
    return lambda root: [file.unlink() for file in (root / path).iterdir()]


def leave(path: str):
    """Make a link that leads out of the root."""

    def change(root: Path) -> None:
        outside = root.parent / "outside.JPEG"
        Image.new("RGB", (8, 8)).save(outside)
        (root / path).symlink_to(outside)

    return change


CAT = "n02124075"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("wnids.txt"), "tiny-imagenet: .* holds none of: tiny-imagenet-200, wnids.txt"),
        (put("wnids.txt", ""), r"wnids\.txt: expected one synset .* on each line"),
        (put("wnids.txt", f"{CAT}\n{CAT}\n"), r"wnids\.txt: expected one synset .* each of them once"),
        (put("wnids.txt", f"{CAT}\n../../etc\n"), r"wnids\.txt: expected one synset"),
        (put("wnids.txt", f"{CAT}\nn00000000\n"), r"train/n00000000: is missing, but wnids\.txt names it"),
        (put("wnids.txt", f"{CAT}\n"), r"val_annotations\.txt: val_1\.JPEG: expected a synset of wnids\.txt"),
        (empty(f"train/{CAT}/images"), rf"train/{CAT}: expected images, found none"),
        (leave(f"train/{CAT}/images/a.JPEG"), r"a\.JPEG: is a link to a target outside"),
        (remove("val/val_annotations.txt"), r"val_annotations\.txt: cannot be read"),
        (remove("val/images/val_3.JPEG"), r"val_3\.JPEG: is missing, but val_annotations\.txt names it"),
        (put("val/val_annotations.txt", f"val_0.JPEG\t{CAT}\t0\t0\t1\t1\n"), r"has no line for 7 images"),
        (put("val/val_annotations.txt", f"val_0.JPEG\t{CAT}\n" * 2), r"names val_0\.JPEG twice"),
        (put("val/val_annotations.txt", "val_0.JPEG\n"), r"val_0\.JPEG: expected a synset .* got ''"),
        (put(f"train/{CAT}/images/{CAT}_3.JPEG", "x"), rf"{CAT}_3\.JPEG: cannot be read as an image"),
    ],
)
def test_a_wrong_tiny_imagenet_is_refused_by_the_name_of_the_file(tiny, change, message) -> None:
    change(tiny)
    with pytest.raises(DataError, match=message):
        load("tiny-imagenet", tiny)


def test_imagenet(imagenet) -> None:
    images = load("imagenet", imagenet, image_size=32)
    assert images.classes == ("tench", "cassette player")
    assert images.train.labels.bincount().tolist() == [10, 10] and len(images.test) == 8
    (imagenet / "LOC_synset_mapping.txt").rename(imagenet / "words.txt")
    (imagenet / "words.txt").write_text("n01440764\ttench\nn99999999\tother\n")
    again = load("imagenet", imagenet, image_size=32)
    assert again.classes == ("tench", "n02979186") and again.digest == images.digest
    # The default size is that of most models.
    assert create_dataset("imagenet", root=str(imagenet)).load().image_size == 224


def test_resize_and_crop_are_those_of_torchvision(imagenet) -> None:
    images = load("imagenet", imagenet, image_size=24, resize=32)
    change = Compose([Resize(32, InterpolationMode.BILINEAR), CenterCrop(24)])
    theirs = ImageFolder(imagenet / "val", change)
    for image, (expected, label), own in zip(images.test.images, theirs, images.test.labels, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected)) and label == own
    same = load("imagenet", imagenet, image_size=24, resize=24)
    assert same.digest == load("imagenet", imagenet, image_size=24).digest != images.digest
    for resize in (23, 9000):
        with pytest.raises(ConfigError, match=r"dataset: resize: expected image_size \(24\) to 8192 pixels"):
            load("imagenet", imagenet, image_size=24, resize=resize)


def test_a_subset_of_the_classes_may_be_tested(imagenet) -> None:
    remove("val/n01440764")(imagenet)
    assert load("imagenet", imagenet, image_size=8).test.labels.tolist() == [1] * 4


def test_cmyk_images_are_converted_as_by_torchvision(imagenet) -> None:
    path = imagenet / "val" / "n01440764" / "n01440764_0.JPEG"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    Image.fromarray(pixels, "CMYK").save(path)
    images = load("imagenet", imagenet, image_size=32)
    with Image.open(path) as file:
        assert file.mode == "CMYK"
        np.testing.assert_array_equal(images.test.images[0].permute(1, 2, 0), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("val"), "imagenet: .* holds none of: train and val"),
        (
            lambda root: (root / "train" / "cat").mkdir(),
            r"train/cat: expected class folders named by synsets",
        ),
        (lambda root: (root / "val" / "n00000001").mkdir(), r"val/n00000001: expected the classes of train"),
        (empty("train/n01440764"), r"train/n01440764: expected images, found none"),
        (empty("val/n01440764"), r"val/n01440764: expected images, found none"),
        (leave("train/n01440764/a.JPEG"), r"a\.JPEG: is a link to a target outside"),
        (put("train/n01440764/n01440764_2.JPEG", ""), r"n01440764_2\.JPEG: cannot be read as an image"),
    ],
)
def test_a_wrong_imagenet_is_refused_by_the_name_of_the_file(imagenet, change, message) -> None:
    change(imagenet)
    with pytest.raises(DataError, match=message):
        load("imagenet", imagenet, image_size=8)


def test_validation_images_that_are_not_sorted_into_folders_are_said(imagenet) -> None:
    for path in (imagenet / "val").rglob("*.JPEG"):
        path.rename(imagenet / "val" / path.name)
    for folder in list((imagenet / "val").iterdir()):
        if folder.is_dir():
            folder.rmdir()
    with pytest.raises(DataError, match=r"val: expected class folders .* it has 8 files, which belong into"):
        load("imagenet", imagenet)


def test_other_files_are_counted(imagenet) -> None:
    (imagenet / "train" / "n01440764" / "boxes.txt").touch()
    with pytest.warns(BbmoeWarning, match=r"1 file left out: 1 \.txt"):
        load("imagenet", imagenet, image_size=8)


def test_equal_names_are_told_apart_by_the_synset(tmp_path) -> None:
    table = tmp_path / "words.txt"
    table.write_text("n02012849 crane, bird\nn03126707 crane\nn01440764 tench, Tinca\n")
    names = name_synsets(["n01440764", "n02012849", "n03126707", "n00000000"], [tmp_path / "none", table])
    assert names == ("tench", "crane (n02012849)", "crane (n03126707)", "n00000000")
    table.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"words\.txt: cannot be read"):
        name_synsets(["n01440764"], [table])
