"""CIFAR-100 in its "python" version."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR100 as Reference

from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.data.cifar100 import COARSE, FINE, MD5
from backdoorbench_moe.errors import ConfigError, DataError

Files = dict[str, dict[str, object]]


@pytest.fixture
def files(rng: np.random.Generator) -> Files:
    return {
        name: {
            "filenames": [f"{n}.png" for n in range(count)],
            "batch_label": "x",
            "fine_labels": rng.integers(0, 100, count).tolist(),
            "coarse_labels": rng.integers(0, 20, count).tolist(),
            "data": rng.integers(0, 256, (count, 3072), np.uint8),
        }
        for name, count in (("train", 12), ("test", 5))
    }


def write(root: Path, files: Files) -> Path:
    (folder := root / "cifar-100-python").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, 2))
    return folder


def load(root: Path, **options):
    return create_dataset("cifar100", root=str(root), **options).load()


def test_images_and_labels_are_those_of_torchvision(tmp_path, files, monkeypatch) -> None:
    folder = write(tmp_path, files)
    meta = {"fine_label_names": list(FINE), "coarse_label_names": list(COARSE)}
    (folder / "meta").write_bytes(pickle.dumps(meta, 2))
    monkeypatch.setattr(Reference, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for root in (tmp_path, folder):
        images = load(root)
        for name, split in (("train", images.train), ("test", images.test)):
            theirs = Reference(tmp_path, train=name == "train")
            np.testing.assert_array_equal(split.images.permute(0, 2, 3, 1), theirs.data)
            assert split.labels.tolist() == theirs.targets
        assert images.classes == tuple(theirs.classes)
    assert Reference.tgz_md5 == MD5


def test_names_are_in_alphabetical_order() -> None:
    for names, count in ((FINE, 100), (COARSE, 20)):
        assert list(names) == sorted(names) and len(set(names)) == count


def test_coarse_labels(tmp_path, files) -> None:
    write(tmp_path, files)
    images = load(tmp_path, labels="coarse")
    assert images.train.labels.tolist() == files["train"]["coarse_labels"] and images.classes == COARSE
    with pytest.raises(ConfigError, match="labels"):
        load(tmp_path, labels="both")


def test_the_archive_is_read_in_place(tmp_path, files) -> None:
    folder = write(tmp_path / "folder", files)
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../evil", "cifar-100-python/train", "cifar-100-python/test"):
            content = b"x" if "evil" in name else (folder / Path(name).name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert load(path).digest == load(tmp_path).digest == load(folder).digest
    assert not (tmp_path.parent / "evil").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def no_test(files: Files) -> None:
    del files["test"]


def label(files: Files) -> None:
    files["train"]["fine_labels"][3] = 100


def missing_labels(files: Files) -> None:
    del files["train"]["fine_labels"]


def fewer_labels(files: Files) -> None:
    files["test"]["fine_labels"].pop()


def narrow(files: Files) -> None:
    files["test"]["data"] = files["test"]["data"][:, :-1]


def evil(files: Files) -> None:
    files["train"]["data"] = Evil()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_test, r"cifar-100-python: test is missing"),
        (label, r"train: expected labels in 0\.\.99, got 0\.\.100|train: expected labels in 0\.\.99, got"),
        (missing_labels, r"train: fine_labels: expected a list of integers, got NoneType"),
        (fewer_labels, r"test: expected a label for each of 5 images, got 4"),
        (narrow, r"test: data: expected bytes \(N, 3072\), got \(5, 3071\)"),
        (evil, r"train: .*posix\.mkdir"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, files, monkeypatch, damage, message) -> None:
    monkeypatch.chdir(tmp_path)
    damage(files)
    write(tmp_path, files)
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_a_folder_without_it_says_what_is_looked_for(tmp_path) -> None:
    with pytest.raises(DataError, match=r"cifar100: .* holds none of: cifar-100-python, .*--download"):
        load(tmp_path)
