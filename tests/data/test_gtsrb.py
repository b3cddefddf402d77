"""GTSRB in the published layout and in torchvision's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.images import Form, read_images
from backdoorbench_moe.errors import BbmoeWarning, DataError
from backdoorbench_moe.ops.stored_images import StoredImages

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"


def ppm(path: Path, value: int, size: tuple[int, int] = (32, 32)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path.name


def write_csv(path: Path, rows: list[tuple[str, object]]) -> None:
    lines = [HEADER, *(f"{name};32;32;0;0;31;31;{label}" for name, label in rows)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def base(tmp_path) -> Path:
    """Three images each of classes 0, 7 and 42; two test images, not in their names' order."""
    base = tmp_path / "GTSRB"
    for label in (0, 7, 42):
        folder = base / "Final_Training" / "Images" / f"{label:05d}"
        names = [ppm(folder / f"00000_{i:05d}.ppm", label + i, (15 + 40 * i, 30 + i)) for i in range(3)]
        write_csv(folder / f"GT-{label:05d}.csv", [(name, label) for name in names])
    tests = base / "Final_Test" / "Images"
    write_csv(base / "GT-final_test.csv", [(ppm(tests / "1.ppm", 100), 42), (ppm(tests / "0.ppm", 200), 7)])
    return base


def load(root: Path, **options):
    return create_dataset("gtsrb", root=str(root), **options).load()


def test_published_layout(base) -> None:
    images = load(base)
    assert images.train.labels.tolist() == [0, 0, 0, 7, 7, 7, 42, 42, 42]
    assert images.train.images[:, 0, 5, 5].tolist() == [0, 1, 2, 7, 8, 9, 42, 43, 44]
    assert images.test.labels.tolist() == [42, 7] and images.test.images[:, 0, 9, 9].tolist() == [100, 200]
    assert images.train.images.shape == (9, 3, 32, 32)
    assert len(set(images.classes)) == 43
    assert (images.classes[14], images.classes[13], images.classes[38]) == ("stop", "give way", "keep right")
    assert load(base.parent).digest == images.digest


def test_the_second_run_decodes_nothing_and_has_the_same_pixels(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BBMOE_CACHE", str(tmp_path / "cache"))
    first = load(base)
    paths = sorted((base / "Final_Training" / "Images").rglob("*.ppm"))
    assert torch.equal(first.train.images, read_images(paths, Form(32, crop=False)))
    assert len(list((tmp_path / "cache" / "decoded").glob("*.images"))) == 2
    monkeypatch.setattr("backdoorbench_moe.data.images.decode_content", None)
    again = load(base)
    assert torch.equal(again.train.images, first.train.images) and again.digest == first.digest
    monkeypatch.setenv("BBMOE_MEMORY", "1KB")
    stored = load(base)
    assert isinstance(stored.train.images, StoredImages) and stored.digest == first.digest


@pytest.mark.parametrize("place", ["Final_Test", "Final_Test/Images", ".."])
def test_places_of_the_test_csv(base, place) -> None:
    table = (base / "GT-final_test.csv").rename(base / place / "GT-final_test.csv")
    assert load(base).test.labels.tolist() == [42, 7]
    dataset = create_dataset("gtsrb", root=str(base))
    before = dataset.fingerprint()
    assert dataset.fingerprint() == before
    write_csv(table, [("1.ppm", 7), ("0.ppm", 42)])
    os.utime(table, (1, 1))
    assert dataset.fingerprint() != before, "a table with other labels, wherever it is, is noticed"


def test_a_file_in_the_place_of_the_folder_is_said(base) -> None:
    with pytest.raises(
        DataError, match=r"GT-final_test\.csv is a file; expected a folder with one of: GTSRB"
    ):
        load(base / "GT-final_test.csv")


def test_image_size_and_subset(base) -> None:
    images = load(base, image_size=48, train_images=4)
    assert images.train.images.shape == (4, 3, 48, 48) and images.test.images.shape == (2, 3, 48, 48)
    whole = load(base)
    assert set(images.train.images[:, 0, 5, 5].tolist()) <= set(whole.train.images[:, 0, 5, 5].tolist())


def test_a_wide_image_is_squeezed_and_not_cut(base) -> None:
    """The left fifth of a test image of 30x15 pixels is white; a square from the middle would not show it."""
    image = Image.new("RGB", (30, 15))
    image.paste((255, 255, 255), (0, 0, 6, 15))
    image.save(base / "Final_Test" / "Images" / "1.ppm")
    row = load(base, image_size=20).test.images[0, 0, 10]
    assert (row[:3] > 250).all() and (row[6:] < 5).all()


def test_torchvision_layout_says_its_count(base, tmp_path) -> None:
    (tmp_path / "gtsrb").mkdir()
    (base / "Final_Training" / "Images").rename(base / "Training")
    base.rename(tmp_path / "gtsrb" / "GTSRB")
    with pytest.warns(BbmoeWarning, match=r"torchvision's layout with 9 training images; .*39,209"):
        images = load(tmp_path)
    assert images.train.labels.tolist() == [0, 0, 0, 7, 7, 7, 42, 42, 42]


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(DataError, match=r"gtsrb: .* holds none of: .*Final_Training.*--data-root"):
        load(tmp_path)


def seven(base: Path, *parts: str) -> Path:
    return base.joinpath("Final_Training", "Images", "00007", *parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: seven(base, "GT-00007.csv").unlink(), r"GT-00007\.csv: is missing"),
        (lambda base: (base / "GT-final_test.csv").unlink(), r"GT-final_test\.csv: is missing \(also looked"),
        (
            lambda base: seven(base, "00000_00001.ppm").unlink(),
            r"00000_00001\.ppm: is missing, but GT-00007\.csv",
        ),
        (
            lambda base: ppm(seven(base, "x.ppm"), 1),
            r"GT-00007\.csv: has no row for 1 images, such as x\.ppm",
        ),
        (
            lambda base: seven(base, "00000_00002.ppm").write_bytes(b"P6\n32 32\n255\nshort"),
            r"00007/00000_00002\.ppm: cannot be read as an image",
        ),
        (
            lambda base: seven(base).rename(seven(base).with_name("00043")),
            "00043: expected class folders 00000",
        ),
        (
            lambda base: write_csv(base / "GT-final_test.csv", [("0.ppm", 43), ("1.ppm", 0)]),
            r"GT-final_test\.csv: 0\.ppm: expected a ClassId in 0\.\.42, got '43'",
        ),
        (
            lambda base: write_csv(base / "GT-final_test.csv", [("0.ppm", "9" * 5000), ("1.ppm", 0)]),
            r"expected a ClassId in 0\.\.42, got '999",
        ),
        (
            lambda base: write_csv(base / "GT-final_test.csv", [("0.ppm", -1), ("1.ppm", 0)]),
            r"expected a ClassId in 0\.\.42, got '-1'",
        ),
        (
            lambda base: write_csv(
                seven(base, "GT-00007.csv"), [(f"00000_0000{i}.ppm", 8) for i in range(3)]
            ),
            r"00000_00000\.ppm: expected ClassId 7 as its folder says, got 8",
        ),
        (
            lambda base: (base / "GT-final_test.csv").write_text("Filename;Width\n0.ppm;32\n"),
            "expected the columns Filename and ClassId, found no 'ClassId'",
        ),
        (
            lambda base: (base / "GT-final_test.csv").write_bytes(b"Filename;ClassId\n\xff\xfe"),
            "cannot be read",
        ),
        (
            lambda base: write_csv(base / "GT-final_test.csv", [("../../secret.ppm", 1)]),
            r"secret\.ppm: is missing, but GT-final_test\.csv names it",
        ),
    ],
)
def test_damage_names_the_file_and_what_is_wrong(base, damage, message) -> None:
    damage(base)
    with pytest.raises(DataError, match=message):
        load(base)


@pytest.mark.parametrize("again", ["1.ppm", "0.ppm"])
def test_an_image_that_is_named_twice_is_refused_with_the_line(base, again) -> None:
    rows = [("1.ppm", 42), ("0.ppm", 7), (again, 7)]
    write_csv(base / "GT-final_test.csv", rows)
    first = 2 + [name for name, _ in rows].index(again)
    message = rf"GT-final_test\.csv: line 4: names {again} again, which line {first} names already"
    with pytest.raises(DataError, match=message):
        load(base)
    write_csv(seven(base, "GT-00007.csv"), [(f"00000_0000{i % 3}.ppm", 7) for i in range(4)])
    with pytest.raises(DataError, match=r"GT-00007\.csv: line 5: names 00000_00000\.ppm again"):
        load(base)


@pytest.mark.parametrize(
    "place", ["Final_Training/Images", "Final_Training/Images/00007", "Final_Test/Images", ""]
)
def test_clutter_changes_nothing(base, place) -> None:
    digest = load(base).digest
    for name in (
        ".DS_Store",
        "._00000_00000.ppm",
        "Thumbs.db",
        ".ipynb_checkpoints/00000_00000.ppm",
        "__MACOSX/x.ppm",
    ):
        (base / place / name).parent.mkdir(exist_ok=True)
        (base / place / name).touch()
    assert load(base).digest == digest


def test_clutter_in_torchvisions_layout_changes_nothing(base) -> None:
    (base / "Final_Training" / "Images").rename(base / "Training")
    for name in ("00007/._00000_00000.ppm", ".ipynb_checkpoints"):
        (base / "Training" / name).touch()
    with pytest.warns(BbmoeWarning, match="with 9 training images"):
        assert len(load(base).train) == 9


def test_images_of_another_format_are_taken_where_the_table_names_them(base) -> None:
    digest = load(base).digest
    for path in seven(base).glob("*.ppm"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    write_csv(seven(base, "GT-00007.csv"), [(f"00000_0000{i}.png", 7) for i in range(3)])
    assert load(base).digest == digest


def test_real_sample(samples) -> None:
    images = load(samples)
    assert len(images.train) == 1290 and len(images.test) == 860
    assert images.train.labels.bincount().tolist() == [30] * 43
    first = next((samples / "GTSRB" / "Final_Training" / "Images" / "00000").glob("00000_00000.ppm"))
    np.testing.assert_array_equal(images.train.images[0].permute(1, 2, 0), np.asarray(Image.open(first)))
