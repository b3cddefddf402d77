"""Any folder of class folders."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.listing import LeftOut, find_images, order_classes
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, DataError


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
    with pytest.raises(DataError, match=r"cat/out\.png: is a link to a target outside"):
        load(root)
    (root / "cat" / "out.png").unlink()
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"root/eel: is a link to a target outside"):
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
        (lambda root: None, "root=.* expected a folder of class folders, but it does not exist"),
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


def touch(root: Path, *names: str) -> None:
    """Write empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# Folders within a class folder, and files; suffixes that both torchvision and we take, and ones that neither takes.
NAMES = st.text("ab1. _", min_size=1, max_size=4).filter(lambda name: name.strip(". ") and name[0] != ".")
FILES = st.builds(
    lambda folders, name, suffix: "/".join([*(f"{folder}d" for folder in folders), name + suffix]),
    st.lists(NAMES, max_size=3),
    NAMES,
    st.sampled_from([".png", ".JPG", ".tif", ".tiff", ".webp", ".txt", ".json", ""]),
)


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(st.sampled_from(["cat", "dog", "eel"]), st.lists(FILES, unique=True), min_size=1)
)
def test_class_folders_are_recursed_as_torchvision_does(files) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, paths in files.items():
            touch(root / name, "first.png", *paths)
        left_out = LeftOut()
        ours = {name: find_images(root / name, root, left_out) for name in files}
        theirs = ImageFolder(folder)
    expected = {name: set() for name in files}
    for path, label in theirs.samples:
        expected[theirs.classes[label]].add(Path(path))
    assert {name: set(paths) for name, paths in ours.items()} == expected
    assert all(len(paths) == len(set(paths)) for paths in ours.values())
    everything = sum(1 + len(set(paths)) for paths in files.values())
    assert left_out.counts.total() == everything - sum(map(len, ours.values()))


def test_images_of_subfolders_count_and_come_after_the_folders_own(tmp_path) -> None:
    fill(tmp_path / "train" / "cat" / "b", range(20, 22))
    fill(tmp_path / "train" / "cat" / "a" / "deep", range(10, 12))
    fill(tmp_path / "test" / "cat", range(1))
    Image.new("RGB", (20, 30), (30, 0, 0)).save(tmp_path / "train" / "cat" / "z.png")
    assert reds(load(tmp_path).train) == [30, 10, 11, 20, 21]


def test_what_is_left_out_is_counted_by_suffix(tmp_path) -> None:
    fill(tmp_path / "cat", range(4))
    fill(tmp_path / "dog" / "pack", range(4))
    whole = load(tmp_path)
    touch(tmp_path, "README.md", "photo.png", "dog/pack/a.txt", "dog/b.TXT", "cat/labels", "cat/.hidden.png")
    touch(tmp_path, "dog/.cache/x.png", "dog/.cache/deep/y.png", "cat/film.mp4")
    message = (
        r"9 files left out: 3 hidden, 2 \.txt, (1 \.md, 1 outside of class folders|1 .*, 1 .*), 1 .*, 1 .*$"
    )
    with pytest.warns(BbmoeWarning, match=message) as said:
        images = load(tmp_path)
    assert images.digest == whole.digest and len(said) == 1
    for part in ("1 .md", "1 outside of class folders", "1 without a suffix", "1 .mp4"):
        assert part in str(said[0].message)


@pytest.mark.parametrize("split", [True, False])
def test_files_in_hidden_folders_beside_the_class_folders_are_counted(tmp_path, split) -> None:
    bases = [tmp_path / "train", tmp_path / "test"] if split else [tmp_path]
    for base in bases:
        fill(base / "cat", range(4))
        fill(base / "dog", range(4))
    whole = load(tmp_path)
    touch(bases[0], ".eel/a.png", ".eel/deep/b.png")
    (bases[0] / ".empty").mkdir()
    with pytest.warns(BbmoeWarning, match=r"2 files left out: 2 hidden$"):
        assert load(tmp_path).digest == whole.digest


@pytest.mark.skipif(os.name == "nt", reason="names of files are texts there")
def test_names_that_are_not_utf_8_are_read_and_have_a_fingerprint(tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    fill(folder, range(10, 14))
    (folder / "010.png").rename(folder / os.fsdecode(b"na\xefve.png"))
    fill(tmp_path / "dog", range(4))
    dataset = create_dataset("folder", root=str(tmp_path))
    assert len(dataset.load().train) == 6 and dataset.load().classes == (folder.name, "dog")
    before = dataset.fingerprint()
    os.utime(folder / os.fsdecode(b"na\xefve.png"), (1, 1))
    assert before is not None and dataset.fingerprint() != before


CLUTTER = [".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", "__MACOSX/._000.png", "__MACOSX/cat/000.png"]
CLUTTER += [".ipynb_checkpoints/000-checkpoint.png", "@eaDir/000.png/thumb.jpg", ".git/config"]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("level", ["", "train", "cat", "cat/deep"])
def test_clutter_changes_and_says_nothing_at_any_level(tmp_path, split, level) -> None:
    bases = [tmp_path / "train", tmp_path / "test"] if split else [tmp_path]
    for base in bases:
        fill(base / "cat", range(4))
        fill(base / "cat" / "deep", range(10, 14))
        fill(base / "dog", range(4))
    clean = load(tmp_path)
    for base in (tmp_path / level,) if level in ("", "train") else (base / level for base in bases):
        if base.is_dir():
            touch(base, *CLUTTER)
    images = load(tmp_path)  # A BbmoeWarning would be an error here.
    assert (images.digest, images.classes) == (clean.digest, ("cat", "dog"))


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("TRAIN", "test"), ("training", "Testing"), ("train", "test")]
)
def test_split_folders_in_any_case(tmp_path, train, test) -> None:
    fill(tmp_path / train / "cat", range(3))
    fill(tmp_path / test / "cat", range(10, 12))
    images = load(tmp_path)
    assert (reds(images.train), reds(images.test)) == ([0, 1, 2], [10, 11])


@pytest.mark.parametrize("name", ["val", "Valid", "validation"])
def test_a_validation_folder_is_the_test_set_only_without_one(tmp_path, name) -> None:
    fill(tmp_path / "train" / "cat", range(3))
    fill(tmp_path / name / "cat", range(10, 12))
    with pytest.warns(BbmoeWarning, match=rf"the test images are those of {name}$"):
        assert reds(load(tmp_path).test) == [10, 11]
    fill(tmp_path / "test" / "cat", range(20, 22))
    fill(tmp_path / "extra" / "eel", range(2))
    with pytest.warns(BbmoeWarning, match=r"only train and test are read, not ") as said:
        images = load(tmp_path)
    assert reds(images.test) == [20, 21] and images.classes == ("cat",) and len(said) == 1
    assert name in str(said[0].message) and "extra" in str(said[0].message)


def test_train_may_be_the_name_of_a_class(tmp_path) -> None:
    """Beside the other vehicles, and if nothing else in the folder makes it a split."""
    for name, first in (("bus", 0), ("car", 20), ("train", 40)):
        fill(tmp_path / name, range(first, first + 4))
    images = load(tmp_path)
    assert images.classes == ("bus", "car", "train")
    assert set((images.train.images[images.train.labels == 2][:, 0, 3, 3] // 20).tolist()) == {2}
    fill(tmp_path / "train" / "cat", range(2))
    with pytest.raises(DataError, match="expected both train and test, or neither; found only train"):
        load(tmp_path)


def test_a_folder_of_images_called_train_alone_is_refused(tmp_path) -> None:
    fill(tmp_path / "train", range(4))
    with pytest.raises(DataError, match="expected both train and test, or neither; found only train"):
        load(tmp_path)


@pytest.mark.parametrize(
    "names", [("train", "training", "test"), ("train", "val", "valid"), ("Train", "train", "test")]
)
def test_two_folders_for_one_split_are_refused(tmp_path, names) -> None:
    for name in names:
        fill(tmp_path / name / "cat", range(2))
    if len(list(tmp_path.iterdir())) < len(names):
        pytest.skip("this file system does not tell cases apart")
    with pytest.raises(DataError, match=r"expected one of .*, found \w+ and \w+"):
        load(tmp_path)


def test_classes_named_by_numbers_are_sorted_by_value_and_it_is_said(tmp_path) -> None:
    for number in (10, 2, 0, 1):
        fill(tmp_path / str(number), range(number * 10, number * 10 + 3))
    with pytest.warns(
        BbmoeWarning, match=r"all class folders have numbers as names and are sorted by value \(2 before 10\)"
    ):
        images = load(tmp_path)
    assert images.classes == ("0", "1", "2", "10")
    for label, number in enumerate((0, 1, 2, 10)):
        mine = images.train.images[images.train.labels == label][:, 0, 3, 3]
        assert set((mine // 10).tolist()) == {number}


@pytest.mark.parametrize(
    "names", [["0", "1", "2"], ["00", "01", "10"], ["n02", "n10", "n1"], ["1", "2", "x"]]
)
def test_where_numbers_and_text_sort_alike_nothing_is_said(tmp_path, names) -> None:
    for name in names:
        fill(tmp_path / name, range(2))
    assert load(tmp_path).classes == tuple(sorted(names))


@given(st.lists(st.integers(0, 2000), unique=True, min_size=1))
def test_numbers_are_sorted_as_numbers(numbers) -> None:
    assert order_classes(map(str, numbers)) == [str(number) for number in sorted(numbers)]
    assert order_classes([*map(str, numbers), "x"]) == sorted([*map(str, numbers), "x"])


def test_class_names_need_no_image_to_be_read(tmp_path) -> None:
    for name in ("0", "10", "2"):
        touch(tmp_path / "Train" / name, "damaged.png", "notes.txt")
        touch(tmp_path / "Test" / name, "damaged.png")
    assert create_dataset("folder", root=str(tmp_path)).class_names() == ("0", "2", "10")


def test_a_folder_without_class_folders_has_no_class_names(tmp_path) -> None:
    touch(tmp_path, "1.png", "2.png")
    with pytest.raises(DataError, match=r"expected class folders with images, found none \(2 files left out"):
        create_dataset("folder", root=str(tmp_path)).class_names()


@pytest.mark.parametrize("way", ["itself", "parent", "each other"])
def test_links_in_a_circle_are_said(tmp_path, way) -> None:
    fill(tmp_path / "cat" / "deep", range(3))
    fill(tmp_path / "dog" / "deep", range(3))
    if way == "each other":
        (tmp_path / "cat" / "deep" / "link").symlink_to(tmp_path / "dog")
        (tmp_path / "dog" / "deep" / "link").symlink_to(tmp_path / "cat")
    else:
        (tmp_path / "cat" / "deep" / "link").symlink_to("." if way == "itself" else "..")
    with pytest.raises(DataError, match="link: is a link to a folder that contains it"):
        load(tmp_path)


def test_a_folder_without_any_image_says_what_it_holds(tmp_path) -> None:
    touch(tmp_path, "cat/a.heic", "cat/b.heic", "dog/c.txt")
    with pytest.raises(
        DataError, match=r"expected class folders with images, found none \(3 files .* 2 \.heic, 1 \.txt"
    ):
        load(tmp_path)
